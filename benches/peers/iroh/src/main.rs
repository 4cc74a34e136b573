//! A stream between two processes on loopback with the `iroh` crate, as `lattica-node bench` sends one between two nodes:
//! 256 KiB at a time, until the other process says that the last byte has arrived. No relay, no address lookup, otherwise
//! iroh's own settings.
//!
//! ```text
//! cargo build --release --manifest-path benches/peers/iroh/Cargo.toml
//! benches/peers/iroh/target/release/iroh-bulk [MB [ROUNDS]]
//! ```
//!
//! Prints one JSON object whose fields are named as those of `lattica-node bench --json`.

use std::error::Error;
use std::process::Stdio;
use std::time::Instant;

use iroh::endpoint::presets;
use iroh::{Endpoint, EndpointAddr, RelayMode, SecretKey};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;

const ALPN: &[u8] = b"bench/bulk";
const CHUNK_BYTES: usize = 256 * 1024;
/// What makes this program the other process.
const OTHER: &str = "--other";

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == OTHER) {
        return receive().await;
    }
    let number = |at: usize, default: usize| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (stream_mb, rounds) = (number(0, 1024)?, number(1, 3)?);
    send(stream_mb, rounds.max(1)).await
}

/// An endpoint on loopback that asks nobody for anything.
async fn endpoint() -> Result<Endpoint> {
    let builder = Endpoint::builder(presets::Minimal).relay_mode(RelayMode::Disabled);
    let builder = builder.alpns(vec![ALPN.to_vec()]).clear_ip_transports().bind_addr("127.0.0.1:0")?;
    Ok(builder.secret_key(SecretKey::generate()).bind().await?)
}

/// Starts the other process, sends it the streams and reports.
async fn send(stream_mb: usize, rounds: usize) -> Result<()> {
    let mut other = Command::new(std::env::current_exe()?)
        .arg(OTHER)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(other.stdout.take().ok_or("its output is piped")?).lines();
    let line = lines.next_line().await?.ok_or("the other process ended at once")?;
    let (id, address) = line.split_once(' ').ok_or("an id and an address were expected")?;
    let here = endpoint().await?;
    let connection = here.connect(EndpointAddr::new(id.parse()?).with_ip_addr(address.parse()?), ALPN).await?;
    let (chunk, total) = (vec![0x3c; CHUNK_BYTES], stream_mb * 1_000_000);
    let mut rates = Vec::new();
    for _ in 0..rounds {
        let (mut writer, mut reader) = connection.open_bi().await?;
        let start = Instant::now();
        let mut left = total;
        while left > 0 {
            let n = left.min(chunk.len());
            writer.write_all(&chunk[..n]).await?;
            left -= n;
        }
        writer.finish()?;
        if reader.read_u8().await? != 1 {
            return Err("the other process did not confirm".into());
        }
        rates.push(total as f64 / 1e6 / start.elapsed().as_secs_f64());
    }
    connection.close(0u32.into(), b"");
    here.close().await;
    drop(other.stdin.take());
    let rss = lines.next_line().await?.ok_or("the other process did not tell its memory")?;
    rates.sort_by(f64::total_cmp);
    let median = f64::midpoint(rates[(rounds - 1) / 2], rates[rounds / 2]);
    println!(
        "{{\"stream_mb\":{stream_mb},\"stream_mb_per_s\":{median:.1},\"stream_mb_per_s_min\":{:.1},\"stream_mb_per_s_max\":{:.1},\
         \"stream_rss_mb\":{:.1}}}",
        rates[0],
        rates[rounds - 1],
        peak_rss_mb()?.max(rss.parse()?),
    );
    Ok(())
}

/// Takes streams in, until standard input ends.
async fn receive() -> Result<()> {
    let here = endpoint().await?;
    let address = here.bound_sockets().into_iter().next().ok_or("no address to listen on")?;
    println!("{} {address}", here.id());
    let accepting = here.clone();
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            tokio::spawn(async move {
                let connection = incoming.await?;
                loop {
                    let (mut writer, mut reader) = connection.accept_bi().await?;
                    let mut buffer = vec![0; CHUNK_BYTES];
                    while reader.read(&mut buffer).await?.is_some() {}
                    // Tells the sender that everything has arrived.
                    writer.write_all(&[1]).await?;
                    writer.finish()?;
                }
                #[expect(unreachable_code, reason = "says what the errors are")]
                Result::Ok(())
            });
        }
    });
    tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
    println!("{:.1}", peak_rss_mb()?);
    here.close().await;
    Ok(())
}

/// Peak resident memory of this process in MB.
fn peak_rss_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).ok_or("the system does not tell")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("the system does not tell")?.parse()?;
    Ok(kib * 1024.0 / 1e6)
}
