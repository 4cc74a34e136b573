//! `training-swarm pretrain`: makes a tiny model from a configuration.

use echo_trainer::PretrainConfig;
use echo_trainer::service::pretraining::pretrain;

use super::MakeArgs;
use crate::program;

/// Runs it.
///
/// # Errors
/// A missing or malformed file, settings out of range, a full disk.
pub fn run(args: &MakeArgs) -> anyhow::Result<()> {
    let config: PretrainConfig = program::settings(&args.config)?;
    let report = pretrain(&config, &args.out, |p| {
        program::say(&format!(
            "step {:5}  loss {:.4}  held-out reward {:.3}  {:.0} s",
            p.step, p.loss, p.held_out_reward, p.seconds
        ));
    })?;
    let line = format!(
        "{} parameters, loss {:.3} -> {:.3}, held-out reward {:.3}, {:.0} s: {}",
        report.parameters,
        report.loss_before,
        report.loss_after,
        report.held_out_reward,
        report.seconds,
        args.out.display()
    );
    program::tell(&line, args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}
