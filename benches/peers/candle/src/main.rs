//! Prefill and decode of a GGUF file with candle's quantised models on the CPU, for `cargo xtask bench --peers DIR`.
//!
//! ```text
//! RUSTFLAGS='-C target-cpu=native' cargo build --release --manifest-path benches/peers/candle/Cargo.toml
//! benches/peers/candle/target/release/candle-gguf MODEL.gguf [THREADS]
//! ```
//!
//! Prints the part of what `parallax bench --json` prints that candle has: of architectures `llama` and `qwen3` (its
//! Qwen3-MoE computes experts on CUDA only). What it refuses is left out, and said on stderr.

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::process::{Command, exit};
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen3};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// candle asks this for its threads.
const THREADS: &str = "RAYON_NUM_THREADS";
const PROMPTS: [usize; 2] = [128, 512];
const BATCHES: [usize; 3] = [1, 8, 32];
/// Tokens in the cache before decoding, and tokens decoded.
const CONTEXT: usize = 16;
const TOKENS: usize = 64;
const REPEATS: usize = 3;
/// No further run, and no further step, begins after this.
const ENOUGH: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let file = arguments.first().ok_or("usage: candle-gguf MODEL.gguf [THREADS]")?;
    let threads = arguments.get(1).map_or("2", String::as_str);
    if std::env::var(THREADS).as_deref() != Ok(threads) {
        // Set from the beginning, for every thread: by starting again.
        let again =
            Command::new(std::env::current_exe()?).args([file, threads]).env(THREADS, threads).status()?;
        exit(again.code().unwrap_or(1));
    }
    let mut model = Model::load(Path::new(file))?;
    model.prefill(64)?;
    let mut prefills = Vec::new();
    for n_tokens in PROMPTS {
        let Some([rate, min, max]) = repeated(&format!("prefill {n_tokens}"), || model.prefill(n_tokens))
        else {
            continue;
        };
        prefills.push(format!(
            r#"{{"prompt_tokens":{n_tokens},"tokens_per_s":{rate:.2},"min":{min:.2},"max":{max:.2}}}"#
        ));
    }
    let mut decodes = Vec::new();
    for batch in BATCHES {
        let Some([rate, min, max]) = repeated(&format!("batch {batch}"), || model.decode(batch)) else {
            continue;
        };
        let one = rate / batch as f64;
        decodes.push(
            format!(
                r#"{{"batch":{batch},"context":{CONTEXT},"tokens_per_s":{one:.2},"aggregate":{rate:.2},"#
            ) + &format!(r#""aggregate_min":{min:.2},"aggregate_max":{max:.2}}}"#),
        );
    }
    println!(r#"{{"prefill":[{}],"decode":[{}]}}"#, prefills.join(","), decodes.join(","));
    Ok(())
}

/// Median, smallest and largest rate of some runs; fewer when they take long.
fn repeated(work: &str, mut run: impl FnMut() -> Result<f64>) -> Option<[f64; 3]> {
    let begin = Instant::now();
    let mut rates = Vec::new();
    while rates.len() < REPEATS && (rates.is_empty() || begin.elapsed() < ENOUGH) {
        match run() {
            Ok(rate) => rates.push(rate),
            Err(error) => {
                eprintln!("{work} left out: {error}");
                return None;
            }
        }
    }
    rates.sort_by(f64::total_cmp);
    let found = [rates[rates.len() / 2], rates[0], rates[rates.len() - 1]];
    eprintln!("{work}: {:.1} tokens/s, {} runs", found[0], rates.len());
    Some(found)
}

enum Weights {
    Llama(quantized_llama::ModelWeights),
    Qwen3(quantized_qwen3::ModelWeights),
}

struct Model {
    weights: Weights,
    n_vocab: usize,
    /// Of the random tokens.
    state: u64,
}

impl Model {
    fn load(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let content = Content::read(&mut file)?;
        let metadata = |key: &str| content.metadata.get(key).ok_or_else(|| format!("{key} is missing"));
        let architecture = metadata("general.architecture")?.to_string()?.clone();
        let n_vocab = metadata("tokenizer.ggml.tokens")?.to_vec()?.len();
        let weights = match architecture.as_str() {
            "llama" => {
                Weights::Llama(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
            }
            "qwen3" => {
                Weights::Qwen3(quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
            }
            other => return Err(format!("candle computes no {other} from GGUF on the CPU").into()),
        };
        Ok(Self { weights, n_vocab, state: 1 })
    }

    fn forward(&mut self, tokens: &Tensor, at: usize) -> Result<Tensor> {
        Ok(match &mut self.weights {
            Weights::Llama(weights) => weights.forward(tokens, at)?,
            Weights::Qwen3(weights) => weights.forward(tokens, at)?,
        })
    }

    fn forget(&mut self) {
        match &mut self.weights {
            Weights::Llama(weights) => weights.clear_kv_cache(),
            Weights::Qwen3(weights) => weights.clear_kv_cache(),
        }
    }

    /// Xorshift: any tokens will do.
    fn random(&mut self, batch: usize, n_tokens: usize) -> Result<Tensor> {
        let token = |_| {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            (self.state % self.n_vocab as u64) as u32
        };
        let tokens: Vec<u32> = (0..batch * n_tokens).map(token).collect();
        Ok(Tensor::from_vec(tokens, (batch, n_tokens), &Device::Cpu)?)
    }

    /// Tokens per second of a prompt, until its next token is known.
    fn prefill(&mut self, n_tokens: usize) -> Result<f64> {
        self.forget();
        let tokens = self.random(1, n_tokens)?;
        let begin = Instant::now();
        let logits = self.forward(&tokens, 0)?;
        next(&logits)?.to_vec2::<u32>()?;
        Ok(n_tokens as f64 / begin.elapsed().as_secs_f64())
    }

    /// Tokens per second of all sequences.
    fn decode(&mut self, batch: usize) -> Result<f64> {
        if batch > 1 && matches!(self.weights, Weights::Qwen3(_)) {
            return Err("candle's Qwen3 caches one sequence on the CPU, and panics at more".into());
        }
        self.forget();
        // One after the other: its Llama refuses prompts of several sequences at once.
        for at in 0..CONTEXT {
            let tokens = self.random(batch, 1)?;
            self.forward(&tokens, at)?;
        }
        let mut tokens = self.random(batch, 1)?;
        let (begin, mut steps) = (Instant::now(), 0);
        while steps < TOKENS && (steps == 0 || begin.elapsed() < ENOUGH) {
            let logits = self.forward(&tokens, CONTEXT + steps)?;
            tokens = next(&logits)?;
            tokens.to_vec2::<u32>()?;
            steps += 1;
        }
        Ok((batch * steps) as f64 / begin.elapsed().as_secs_f64())
    }
}

/// The likeliest token of each sequence, as a column.
fn next(logits: &Tensor) -> Result<Tensor> {
    Ok(logits.argmax(D::Minus1)?.flatten_all()?.unsqueeze(1)?)
}
