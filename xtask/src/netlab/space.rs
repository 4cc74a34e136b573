//! Network namespaces and the devices in them, made by `ip` and removed on drop. Every name begins with the lab's own prefix.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Names of everything that a lab makes begin with this and the number of its process.
const PREFIX: &str = "nlab";

/// The beginning of every name that this process gives.
pub(crate) fn prefix() -> String {
    format!("{PREFIX}{}-", std::process::id())
}

/// A network namespace, gone on drop with the devices in it.
#[derive(Debug)]
pub(crate) struct Space {
    name: String,
}

impl Space {
    /// Makes an empty one whose loopback device is up.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let space = Self { name: format!("{}{name}", prefix()) };
        ip(&["netns", "add", &space.name])?;
        space.ip(&["link", "set", "lo", "up"])?;
        Ok(space)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `ip` inside.
    pub(crate) fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// A command inside.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Gives a device an address and turns it on.
    pub(crate) fn address(&self, device: &str, address: &str) -> Result<()> {
        self.ip(&["address", "add", address, "dev", device])?;
        self.ip(&["link", "set", device, "up"])
    }

    /// Passes packets on between its devices, under these rules.
    pub(crate) fn route(&self, rules: &str) -> Result<()> {
        let forward = ["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"];
        checked(self.command("sh").args(forward), "")?;
        checked(self.command("nft").args(["-f", "-"]), rules)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next lab.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// A device of the machine's own namespace, gone on drop.
#[derive(Debug)]
pub(crate) struct Device(pub(crate) String);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", &self.0]);
    }
}

/// Runs `ip`.
pub(crate) fn ip(args: &[&str]) -> Result<()> {
    checked(Command::new("ip").args(args), "")
}

/// Runs a command with this input; an error carries what it said.
fn checked(command: &mut Command, input: &str) -> Result<()> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    child.stdin.take().context("its input is piped")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Removes what labs left behind whose process is gone.
pub(crate) fn remove_leftovers() -> Result<()> {
    for (list, delete) in [
        (&["netns", "list"][..], &["netns", "delete"][..]),
        (&["-brief", "link", "show", "type", "veth"], &["link", "delete"]),
    ] {
        let output = Command::new("ip").args(list).output().context("starting ip")?;
        for name in leftovers(&String::from_utf8_lossy(&output.stdout)) {
            if !Path::new(&format!("/proc/{}", owner(name).unwrap_or_default())).exists() {
                // A second lab may be doing the same.
                let _ = ip(&[delete, &[name]].concat());
            }
        }
    }
    Ok(())
}

/// Names of labs in what `ip` lists: one a line, perhaps with `@peer` and more behind it.
fn leftovers(listed: &str) -> impl Iterator<Item = &str> {
    listed.lines().filter_map(|line| line.split([' ', '@']).next()).filter(|name| owner(name).is_some())
}

/// The process that gave a name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_labs_are_leftovers() {
        let listed = "nlab12-ix (id: 3)\nnlab7-a0\nother\nnlab-x\nnlabx-y\nnlab12-1a@if4  UP  02:00\n";
        assert_eq!(leftovers(listed).collect::<Vec<_>>(), ["nlab12-ix", "nlab7-a0", "nlab12-1a"]);
        assert_eq!((owner("nlab12-ix"), owner("lo")), (Some(12), None));
        assert_eq!(owner(&format!("{}ix", prefix())), Some(std::process::id()));
    }
}
