//! Models that are not on this machine yet: fetched from a hub before anything opens them; `parallax fetch`.

use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use parallax_engine::service::hub::{DEFAULT_ENDPOINT, Hub, HubProgress};
use parallax_model::Checkpoint;
use parallax_model::hub::{self, HubName};
use serde::Serialize;

use crate::program;

/// Fetch a model from a hub into the cache that Hugging Face's tools share, so that it is here when it is needed.
///
/// HF_ENDPOINT names another hub, HF_TOKEN is sent to it, HF_HUB_CACHE is the cache. What broke off goes on where it was.
/// Report (--json): path, bytes.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  parallax fetch --model HuggingFaceTB/SmolLM2-135M-Instruct\n  parallax fetch --model \
                        ORG/NAME/FILE.gguf@main\n\nEvery --model of parallax fetches what is not here; HF_HUB_OFFLINE=1 forbids it."
)]
pub struct FetchArgs {
    /// ORG/NAME, with @REVISION, with /FILE.gguf
    #[arg(long)]
    model: HubName,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    path: String,
    bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// A hub that does not have the model or cannot be reached, a disk that is full.
pub fn run(args: FetchArgs) -> anyhow::Result<()> {
    let (path, bytes) = fetch(&args.model)?;
    program::tell(&format!("{} is at {path}", args.model), args.json)?;
    if args.json {
        program::report(&Report { path, bytes })?;
    }
    Ok(())
}

/// What `Checkpoint::resolve` finds for a model: itself when it is here, else where it was fetched to. Blocks.
///
/// # Errors
/// As [`run`].
pub fn obtain(model: &str) -> anyhow::Result<String> {
    let here = model == "tiny" || Path::new(model).exists();
    let offline = std::env::var_os("HF_HUB_OFFLINE").is_some_and(|v| v != "0" && !v.is_empty());
    let Some(name) = model.parse::<HubName>().ok().filter(|_| !here && !offline) else {
        return Ok(model.to_owned());
    };
    if hub::cache_dir().and_then(|cache| name.cached(&cache)).is_some() {
        return Ok(model.to_owned());
    }
    let (path, _) = fetch(&name).with_context(|| {
        format!(
            "{model} is not on this machine (without a hub, --model takes tiny, a directory with config.json or a .gguf file)"
        )
    })?;
    Ok(path)
}

/// Opens a model, fetched when it is not here. Blocks.
///
/// # Errors
/// As [`run`], and a model that cannot be read.
pub fn open(model: &str) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::resolve(&obtain(model)?)?)
}

/// Fetches with a bar on stderr; the path and the bytes of its files.
fn fetch(name: &HubName) -> anyhow::Result<(String, u64)> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
    let cache = hub::cache_dir().context("no HOME to keep models in: set HF_HUB_CACHE")?;
    let hub = Hub::new(&endpoint, set("HF_TOKEN"), cache)?;
    program::say(&format!("fetching {name} from {endpoint}"));
    let style =
        ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left")
            .context("progress bar template")?;
    let bar = ProgressBar::new(0).with_style(style);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let tell = |progress: HubProgress<'_>| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        bar.set_message(progress.file.to_owned());
    };
    // A thread of its own: whoever calls may be on one of a runtime.
    let path = std::thread::scope(|scope| {
        let fetching = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok::<_, anyhow::Error>(runtime.block_on(hub.fetch(name, tell))?)
        });
        fetching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let bytes = bar.length().unwrap_or(0);
    bar.finish_and_clear();
    Ok((path.display().to_string(), bytes))
}
