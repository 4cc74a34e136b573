//! Our `parallax bench` beside other engines on the same model files, in turn, so that a machine whose speed drifts is
//! the same for all of them.
//!
//! `--peers DIR` holds their programs: `llama-bench` and `llama-batched-bench` are known; any other executable file is called
//! with the model's path and the number of threads and prints what `parallax bench --json` prints, or the part of it that it can.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::ci::{commit, release_binary};

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub(crate) struct Options {
    /// Directory with the programs of other engines
    #[arg(long)]
    peers: PathBuf,
    /// Model files; others than GGUF are for engines that read them
    #[arg(long, required = true, value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// Threads of every engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How often all engines have their turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print the report on stdout: {"machine","commit","threads","rounds","models":[{"model","rows":[{"work","engines":{NAME:{
    /// "tokens_per_s","min","max"}},"ratio"}]}]}; ratio: ours by the best of the others
    #[arg(long)]
    json: bool,
}

/// What is measured, and the tokens per second of each turn.
type Rates = BTreeMap<String, Vec<f64>>;

/// How our engine is called in tables.
const OURS: &str = "parallax";
const PROMPTS: &str = "128,512";
const BATCHES: &str = "1,8,32";
const TOKENS: &str = "64";

/// One engine: its name and its calls.
struct Engine {
    name: String,
    program: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Parallax,
    LlamaBench,
    LlamaBatchedBench,
    Other,
}

/// Measures all engines and prints the tables.
pub(crate) fn run(root: &Path, options: &Options) -> Result<()> {
    ensure!(options.rounds > 0 && options.threads > 0, "--rounds and --threads must be at least 1");
    let engines = engines(root, &options.peers)?;
    let mut models = Vec::new();
    for model in &options.model {
        ensure!(model.exists(), "{} does not exist", model.display());
        let mut measured: BTreeMap<String, Rates> = BTreeMap::new();
        for round in 1..=options.rounds {
            for engine in &engines {
                eprintln!(
                    "{}: round {round} of {}: {}",
                    model.display(),
                    options.rounds,
                    engine.program.display()
                );
                let rates = match engine.measure(model, options.threads) {
                    Ok(rates) => rates,
                    // One engine that cannot read a format does not keep the others from it.
                    Err(error) if engine.kind != Kind::Parallax => {
                        eprintln!("  left out: {error:#}");
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                for (work, rate) in rates {
                    measured.entry(work).or_default().entry(engine.name.clone()).or_default().push(rate);
                }
            }
        }
        let rows: Vec<Value> = measured.into_iter().map(|(work, rates)| row(&work, rates)).collect();
        table(model, &rows);
        models.push(json!({"model": model.display().to_string(), "rows": rows}));
    }
    if options.json {
        let report = json!({
            "machine": machine(), "commit": commit(root), "threads": options.threads, "rounds": options.rounds,
            "models": models,
        });
        println!("{report}");
    }
    Ok(())
}

/// Ours, and what lies in the directory.
fn engines(root: &Path, peers: &Path) -> Result<Vec<Engine>> {
    let mut engines = vec![Engine {
        name: OURS.to_owned(),
        program: release_binary(root, "swarm-examples", "parallax")?,
        kind: Kind::Parallax,
    }];
    let mut found: Vec<PathBuf> = fs::read_dir(peers)
        .with_context(|| format!("reading {}", peers.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| is_program(path))
        .collect();
    found.sort();
    for program in found {
        let stem = program.file_stem().and_then(OsStr::to_str).unwrap_or_default().to_owned();
        let (name, kind) = match stem.as_str() {
            "llama-bench" => ("llama.cpp".to_owned(), Kind::LlamaBench),
            "llama-batched-bench" => ("llama.cpp".to_owned(), Kind::LlamaBatchedBench),
            // Its other programs.
            other if other.starts_with("llama-") || other.starts_with("lib") => continue,
            _ => (stem, Kind::Other),
        };
        engines.push(Engine { name, program, kind });
    }
    if engines.len() == 1 {
        bail!("{} holds no program of another engine, for example llama-bench", peers.display());
    }
    Ok(engines)
}

#[cfg(unix)]
fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "exe")
}

impl Engine {
    /// Tokens per second of each work that the engine does.
    fn measure(&self, model: &Path, threads: usize) -> Result<Vec<(String, f64)>> {
        let threads = threads.to_string();
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Parallax => {
                command.args(["bench", "--json", "--repeats", "3", "--model"]).arg(model).args([
                    "--threads",
                    &threads,
                    "--prompt-tokens",
                    PROMPTS,
                    "--batch",
                    BATCHES,
                    "--gen-tokens",
                    TOKENS,
                ])
            }
            Kind::LlamaBench => command
                .args(["-o", "json", "-r", "3", "-p", PROMPTS, "-n", TOKENS, "-t", &threads, "-m"])
                .arg(model),
            Kind::LlamaBatchedBench => command
                .args([
                    "--output-format",
                    "jsonl",
                    "-npp",
                    "64",
                    "-ntg",
                    TOKENS,
                    "-npl",
                    "8,32",
                    "-c",
                    "8192",
                ])
                .args(["-t", &threads, "-m"])
                .arg(model),
            Kind::Other => command.arg(model).arg(&threads),
        };
        let output = command.output().with_context(|| format!("running {}", self.program.display()))?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        let last = complaint.trim().lines().last().unwrap_or_default();
        ensure!(output.status.success(), "{} ended with {}: {last}", self.program.display(), output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        match self.kind {
            Kind::LlamaBench => llama_bench(&text),
            Kind::LlamaBatchedBench => llama_batched_bench(&text),
            Kind::Parallax | Kind::Other => parallax_bench(&text),
        }
    }
}

fn prefill(tokens: &Value) -> String {
    format!("prefill {tokens}")
}

fn decode(batch: &Value) -> String {
    format!("decode, batch {batch}")
}

/// The report of `parallax bench`, the last line of stdout.
fn parallax_bench(text: &str) -> Result<Vec<(String, f64)>> {
    let line = text.trim().lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(line).with_context(|| format!("no report: {line:?}"))?;
    let list = |name: &str| report[name].as_array().cloned().unwrap_or_default();
    let prefills =
        list("prefill").into_iter().map(|p| (prefill(&p["prompt_tokens"]), p["tokens_per_s"].as_f64()));
    let decodes = list("decode").into_iter().map(|d| (decode(&d["batch"]), d["aggregate"].as_f64()));
    prefills.chain(decodes).map(|(work, rate)| Ok((work, rate.context("a rate is missing")?))).collect()
}

/// `llama-bench -o json`: a list of tests, each of a prompt or of an answer.
fn llama_bench(text: &str) -> Result<Vec<(String, f64)>> {
    let tests: Vec<Value> = serde_json::from_str(text).context("no JSON of llama-bench")?;
    tests
        .iter()
        .map(|test| {
            let work = if test["n_gen"] == 0 { prefill(&test["n_prompt"]) } else { decode(&json!(1)) };
            Ok((work, test["avg_ts"].as_f64().context("avg_ts is missing")?))
        })
        .collect()
}

/// `llama-batched-bench --output-format jsonl`: a line for each number of sequences.
fn llama_batched_bench(text: &str) -> Result<Vec<(String, f64)>> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| {
            let run: Value = serde_json::from_str(line).context("no JSON of llama-batched-bench")?;
            Ok((decode(&run["pl"]), run["speed_tg"].as_f64().context("speed_tg is missing")?))
        })
        .collect()
}

/// Median, smallest and largest of each engine, and ours by the best of the others.
fn row(work: &str, rates: Rates) -> Value {
    let mut medians = BTreeMap::new();
    let mut engines = serde_json::Map::new();
    for (name, mut rates) in rates {
        rates.sort_by(f64::total_cmp);
        let (n, max) = (rates.len(), rates[rates.len() - 1]);
        // Of an even number of rounds, the middle of the two in the middle.
        let (min, median) = (rates[0], f64::midpoint(rates[(n - 1) / 2], rates[n / 2]));
        engines.insert(name.clone(), json!({"tokens_per_s": median, "min": min, "max": max}));
        medians.insert(name, median);
    }
    let ours = medians.remove(OURS);
    let best = medians.into_values().max_by(f64::total_cmp);
    let ratio = ours.zip(best).map(|(ours, best)| ours / best);
    json!({"work": work, "engines": engines, "ratio": ratio})
}

fn table(model: &Path, rows: &[Value]) {
    eprintln!(
        "\n{}\n| work | engine: tokens/s (smallest to largest) | ours by the best other |\n|---|---|---|",
        model.display()
    );
    for row in rows {
        let engines = row["engines"].as_object().into_iter().flatten().map(|(name, rate)| {
            let number = |field: &str| rate[field].as_f64().unwrap_or(f64::NAN);
            format!("{name} {:.0} ({:.0} to {:.0})", number("tokens_per_s"), number("min"), number("max"))
        });
        let engines: Vec<String> = engines.collect();
        let ratio = row["ratio"].as_f64().map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        eprintln!("| {} | {} | {ratio} |", row["work"].as_str().unwrap_or_default(), engines.join("; "));
    }
}

/// Processor and cores, as far as the system says.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim()));
    format!("{cores} cores, {}", name.unwrap_or(std::env::consts::ARCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_all_engines_are_read() {
        let ours = r#"{"prefill":[{"prompt_tokens":128,"tokens_per_s":900.5}],"decode":[{"batch":8,"tokens_per_s":50,"aggregate":400}]}"#;
        assert_eq!(
            parallax_bench(&format!("loading\n{ours}\n")).unwrap(),
            [("prefill 128".to_owned(), 900.5), ("decode, batch 8".to_owned(), 400.0)]
        );
        let llama = r#"[{"n_prompt":512,"n_gen":0,"avg_ts":450.0},{"n_prompt":0,"n_gen":64,"avg_ts":99.0}]"#;
        assert_eq!(
            llama_bench(llama).unwrap(),
            [("prefill 512".to_owned(), 450.0), ("decode, batch 1".to_owned(), 99.0)]
        );
        let batched = "main: n_kv_max = 8192\n{\"pl\": 32, \"speed_tg\": 164.2}\n";
        assert_eq!(llama_batched_bench(batched).unwrap(), [("decode, batch 32".to_owned(), 164.2)]);
        assert!(parallax_bench("nothing").is_err() && llama_bench("{}").is_err());
        assert!(parallax_bench(r#"{"prefill":[{"prompt_tokens":1}]}"#).is_err(), "a rate is missing");
    }

    #[test]
    fn ours_is_compared_with_the_best_other() {
        let rates =
            [("parallax", vec![100.0, 300.0, 200.0]), ("a", vec![50.0, 20.0]), ("b", vec![80.0, 70.0, 90.0])];
        let row = row("decode", rates.map(|(name, rates)| (name.to_owned(), rates)).into());
        assert_eq!(row["engines"]["parallax"], json!({"tokens_per_s": 200.0, "min": 100.0, "max": 300.0}));
        assert_eq!(row["engines"]["a"], json!({"tokens_per_s": 35.0, "min": 20.0, "max": 50.0}));
        assert_eq!(row["ratio"], 2.5);
    }
}
