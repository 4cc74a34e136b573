//! `tinker-gateway`: the PyPI client `tinker` trains on this machine and samples from it.

use std::process::ExitCode;

use clap::Parser;
use swarm_examples::gateway::{self, GatewayArgs};
use swarm_examples::program;

/// Serves Tinker's API over one base model: adapters are trained and sampled from with the unmodified PyPI client.
///
/// Report (--json): one line when the service listens, {"url","model"}; it serves until it is asked to stop.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example, two terminals:\n  tinker-gateway --model tiny\n  TINKER_BASE_URL=http://127.0.0.1:8383 \
                  TINKER_API_KEY=tml-any python3 train.py\n\ntrain.py: tinker.ServiceClient(), then \
                  create_lora_training_client(base_model=\"tiny\", rank=8), forward_backward, optim_step, \
                  save_weights_and_get_sampling_client."
)]
struct Cli {
    #[command(flatten)]
    gateway: GatewayArgs,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| gateway::run(&cli.gateway))
}
