//! Prometheus text of an engine, under vLLM's names where the meaning is the same.

use std::fmt::Write as _;

use super::gate::Refusals;
use crate::metrics::{EngineMetrics, Histogram};

/// What there is to report.
#[derive(Debug)]
pub(super) struct Scrape<'a> {
    pub engine: &'a EngineMetrics,
    /// Positions of one cache page.
    pub page_tokens: usize,
    pub model: &'a str,
    pub refusals: &'a Refusals,
    /// Memory of this process, where the system tells.
    pub resident_bytes: Option<u64>,
    pub unix_seconds: u64,
}

/// In Prometheus' text format 0.0.4.
pub(super) fn text(scrape: &Scrape<'_>) -> String {
    let engine = scrape.engine;
    let label = format!("model_name=\"{}\"", clean(scrape.model));
    let mut text = String::new();
    let mut one = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{{{label}}} {value}");
    };
    one("vllm:num_requests_running", "gauge", "Requests that hold cache pages.", engine.running as f64);
    one("vllm:num_requests_waiting", "gauge", "Requests in the queue.", engine.waiting as f64);
    one("vllm:kv_cache_usage_perc", "gauge", "Share of cache pages in use, 0 to 1.", engine.kv_usage());
    let states = [
        ("", "Slots of recurrent states.", engine.states),
        ("_running", "Slots with the state of a running request.", engine.states_used),
        ("_kept", "Slots with a state that requests can begin with.", engine.states_kept),
    ];
    for (name, help, n) in states {
        one(&format!("parallax:recurrent_states{name}"), "gauge", help, n as f64);
    }
    one(
        "vllm:num_preemptions_total",
        "counter",
        "Requests that lost their pages.",
        engine.preemptions as f64,
    );
    let counters = [
        (
            "vllm:prefix_cache_queries_total",
            "Prompt tokens looked up in the cache.",
            engine.prefix_cache_queries,
        ),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", engine.prefix_cache_hits),
        ("vllm:spec_decode_num_drafts_total", "How often speculation guessed.", engine.speculations),
        (
            "vllm:spec_decode_num_draft_tokens_total",
            "Tokens that speculation guessed.",
            engine.speculated_tokens,
        ),
        ("vllm:spec_decode_num_accepted_tokens_total", "Guesses that were right.", engine.accepted_tokens),
    ];
    for (name, help, n) in counters {
        one(name, "counter", help, n as f64);
    }
    one("vllm:prompt_tokens_total", "counter", "Prompt tokens taken.", engine.prompt_tokens as f64);
    one("vllm:generation_tokens_total", "counter", "Tokens made.", engine.generated_tokens as f64);

    let name = "vllm:request_success_total";
    let _ = writeln!(text, "# HELP {name} Finished requests by reason.\n# TYPE {name} counter");
    for (reason, n) in [
        ("stop", engine.finished_stop),
        ("length", engine.finished_length),
        ("abort", engine.finished_aborted),
        ("error", engine.finished_error),
    ] {
        let _ = writeln!(text, "{name}{{{label},finished_reason=\"{reason}\"}} {n}");
    }
    let name = "parallax:http_refusals_total";
    let _ =
        writeln!(text, "# HELP {name} Requests answered with an error, by status.\n# TYPE {name} counter");
    for (code, n) in scrape.refusals.counts() {
        let _ = writeln!(text, "{name}{{{label},code=\"{code}\"}} {n}");
    }
    let name = "vllm:cache_config_info";
    let _ = writeln!(text, "# HELP {name} Size of the cache.\n# TYPE {name} gauge");
    let (page_tokens, pages) = (scrape.page_tokens, engine.pages);
    let _ = writeln!(text, "{name}{{{label},block_size=\"{page_tokens}\",num_gpu_blocks=\"{pages}\"}} 1");
    let name = "vllm:lora_requests_info";
    let help = "Adapters of running and of waiting requests; the value is the time of this report.";
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    // What parts the names is in none of them.
    let list = |names: &[String]| {
        names.iter().map(|name| clean(name).replace(',', "_")).collect::<Vec<_>>().join(",")
    };
    let (running, waiting) = (list(&engine.running_adapters), list(&engine.waiting_adapters));
    // Every request of a step may have an adapter of its own.
    let (most, now) = (engine.most_running, scrape.unix_seconds);
    let _ = writeln!(
        text,
        "{name}{{{label},max_lora=\"{most}\",running_lora_adapters=\"{running}\",\
         waiting_lora_adapters=\"{waiting}\"}} {now}"
    );
    if let Some(bytes) = scrape.resident_bytes {
        let name = "process_resident_memory_bytes";
        let _ = writeln!(text, "# HELP {name} Memory of this process.\n# TYPE {name} gauge\n{name} {bytes}");
    }
    let times = &engine.latencies;
    let histograms = [
        ("time_to_first_token_seconds", "From submission to the first token.", &times.time_to_first_token),
        ("inter_token_latency_seconds", "Between two tokens of one answer.", &times.inter_token),
        ("e2e_request_latency_seconds", "From submission to the end.", &times.end_to_end),
        ("request_queue_time_seconds", "From submission to the first step.", &times.queue),
        ("request_prefill_time_seconds", "From the first step to the first token.", &times.prefill),
        ("request_decode_time_seconds", "From the first token to the last one.", &times.decode),
        (
            "request_time_per_output_token_seconds",
            "Of each request, the mean time between two of its tokens.",
            &times.time_per_token,
        ),
        ("request_inference_time_seconds", "From the first step to the last token.", &times.inference),
        ("request_prompt_tokens", "Tokens of prompts.", &times.prompt_tokens),
        ("request_generation_tokens", "Tokens of answers.", &times.generated_tokens),
        ("iteration_tokens_total", "Tokens of one step.", &times.step_rows),
    ];
    for (name, help, observed) in histograms {
        histogram(&mut text, &label, &format!("vllm:{name}"), help, observed);
    }
    text
}

/// What this process has in memory, where there is a /proc.
pub(super) fn resident_bytes() -> Option<u64> {
    resident_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The line `VmRSS: N kB` (proc_pid_status(5)).
fn resident_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Text that cannot break out of a label.
fn clean(text: &str) -> String {
    text.replace(['\\', '"', '\n'], "_")
}

fn histogram(text: &mut String, label: &str, name: &str, help: &str, histogram: &Histogram) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
    for (bound, n) in histogram.cumulative() {
        let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
        let _ = writeln!(text, "{name}_bucket{{{label},le=\"{bound}\"}} {n}");
    }
    let (sum, count) = (histogram.sum(), histogram.count());
    let _ = writeln!(text, "{name}_sum{{{label}}} {sum}\n{name}_count{{{label}}} {count}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_comment_or_a_sample_and_names_cannot_break_out() {
        let mut engine = EngineMetrics {
            running: 2,
            most_running: 8,
            pages: 64,
            generated_tokens: 7,
            speculations: 3,
            running_adapters: vec!["par\"rot".into(), "pirate,2".into()],
            ..EngineMetrics::default()
        };
        engine.latencies.inter_token.observe(0.02);
        let refusals = Refusals::default();
        refusals.count(axum::http::StatusCode::TOO_MANY_REQUESTS);
        let text = text(&Scrape {
            engine: &engine,
            page_tokens: 16,
            model: "a\"b\n",
            refusals: &refusals,
            resident_bytes: Some(4096),
            unix_seconds: 1_750_000_000,
        });
        for line in [
            "parallax:http_refusals_total{model_name=\"a_b_\",code=\"429\"} 1",
            "parallax:http_refusals_total{model_name=\"a_b_\",code=\"other\"} 0",
            "vllm:cache_config_info{model_name=\"a_b_\",block_size=\"16\",num_gpu_blocks=\"64\"} 1",
            "vllm:lora_requests_info{model_name=\"a_b_\",max_lora=\"8\",running_lora_adapters=\"par_rot,pirate_2\",\
             waiting_lora_adapters=\"\"} 1750000000",
            "process_resident_memory_bytes 4096",
            "vllm:request_time_per_output_token_seconds_count{model_name=\"a_b_\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert!(text.contains("vllm:generation_tokens_total{model_name=\"a_b_\"} 7"), "{text}");
        assert!(text.contains("vllm:spec_decode_num_drafts_total{model_name=\"a_b_\"} 3"), "{text}");
        assert!(
            text.contains("vllm:inter_token_latency_seconds_bucket{model_name=\"a_b_\",le=\"0.025\"} 1"),
            "{text}"
        );
        let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        for name in kinds {
            assert!(text.contains(&format!("# HELP {name} ")), "{name} is explained");
        }
        for line in text.lines() {
            assert!(
                line.starts_with('#') || line.rsplit_once(' ').is_some_and(|(_, v)| v.parse::<f64>().is_ok()),
                "{line}"
            );
        }
    }

    #[test]
    fn the_memory_of_this_process_is_read_where_the_system_tells() {
        assert_eq!(resident_of("VmPeak:\t 9 kB\nVmRSS:\t   1234 kB\n"), Some(1234 * 1024));
        assert_eq!(resident_of("Name:\tparallax\n"), None);
        assert_eq!(resident_bytes().is_some(), cfg!(target_os = "linux"));
    }
}
