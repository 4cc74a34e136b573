//! A line between two namespaces that delays, drops and swaps frames as a [`Shaper`] says. This kernel family often lacks `netem`, so
//! frames come up to this process and go down again: each end is a veth whose outer end feeds a macvtap, a device that is read
//! and written like a file. Nothing is changed in a frame; the kernel's header in front of it travels along.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::shaper::{Line, Shaper};
use super::space::{Device, Space, ip, prefix};

/// The kernel's header in front of a frame (`virtio_net_hdr`).
const HEADER_BYTES: usize = 10;
/// Largest frame, header included.
const FRAME_MAX_BYTES: usize = 64 * 1024 + HEADER_BYTES;
/// Frames on their way in one direction, twice: read, and put in order; the kernel keeps, and then drops, what is more.
const FRAMES_MAX: usize = 4096;

/// Connects `device` in `space` with `hub_device` in `hub`, both of which it makes. The line stands as long as what is returned.
pub(crate) fn lay(
    number: usize,
    (space, device): (&Space, &str),
    (hub, hub_device): (&Space, &str),
    line: &Line,
) -> Result<Vec<Device>> {
    if line.is_plain() {
        let peer = ["peer", "name", hub_device, "netns", hub.name()];
        space.ip(&[&["link", "add", device, "type", "veth"], &peer[..]].concat())?;
        return Ok(Vec::new());
    }
    let mut devices = Vec::new();
    let mut ends = Vec::new();
    for (letter, inner_space, inner) in [("a", space, device), ("b", hub, hub_device)] {
        let outer = format!("{}{number}{letter}", prefix());
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", inner, "netns", inner_space.name()])?;
        devices.push(Device(outer.clone()));
        let tap = format!("{outer}t");
        ip(&["link", "add", "link", &outer, "name", &tap, "type", "macvtap", "mode", "passthru"])?;
        ip(&["link", "set", &outer, "up"])?;
        ip(&["link", "set", &tap, "up"])?;
        let index = std::fs::read_to_string(format!("/sys/class/net/{tap}/ifindex"))
            .with_context(|| format!("the number of {tap}"))?;
        let path = format!("/dev/tap{}", index.trim());
        let file = OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.clone())?;
        ends.push(Arc::new(file));
    }
    for (direction, (from, to)) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])].into_iter().enumerate() {
        let shaper = Shaper::new(line.clone(), (2 * number + direction) as u64);
        let (frames, queue) = sync_channel(FRAMES_MAX);
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        // Both threads end when a device is gone.
        std::thread::spawn(move || take_in(&from, shaper, &frames));
        std::thread::spawn(move || let_out(&to, &queue));
    }
    Ok(devices)
}

fn take_in(mut from: &File, mut shaper: Shaper, frames: &SyncSender<(Instant, Vec<u8>)>) {
    let start = Instant::now();
    let mut buffer = vec![0; FRAME_MAX_BYTES];
    while let Ok(n) = from.read(&mut buffer) {
        let n_bytes = n.saturating_sub(HEADER_BYTES);
        if let Some(arrives) = shaper.handle_frame(start.elapsed(), n_bytes)
            && frames.send((start + arrives, buffer[..n].to_vec())).is_err()
        {
            break;
        }
    }
}

fn let_out(mut to: &File, queue: &Receiver<(Instant, Vec<u8>)>) {
    // By the time at which they arrive, then in the order in which they came.
    let mut waiting: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>> = BinaryHeap::new();
    let mut come = 0;
    loop {
        let Some(Reverse((at, ..))) = waiting.peek() else {
            let Ok((at, frame)) = queue.recv() else { return };
            waiting.push(Reverse((at, come, frame)));
            come += 1;
            continue;
        };
        let wait = at.saturating_duration_since(Instant::now());
        if wait > Duration::ZERO && waiting.len() < FRAMES_MAX {
            match queue.recv_timeout(wait) {
                Ok((at, frame)) => {
                    waiting.push(Reverse((at, come, frame)));
                    come += 1;
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        } else if wait > Duration::ZERO {
            std::thread::sleep(wait);
        }
        if let Some(Reverse((.., frame))) = waiting.pop() {
            // A frame that the other end cannot take now is lost, as on any line; one that is gone for good ends the reader, too.
            let _ = to.write(&frame);
        }
    }
}
