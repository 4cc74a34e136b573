//! `parallax devices`: what `--device` can name on this machine.

use clap::Args;
use parallax_model::DeviceKind;
use serde::Serialize;

use crate::program;

/// What `--device` can name: the processor, and the GPUs that this program was built for and finds.
///
/// Report (--json): devices [{device, name, missing}]; `name` is the driver's, for the processor with the instruction set of its
/// kernels, null where `missing` says why there is none.
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    device: String,
    name: Option<String>,
    missing: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// A closed stdout.
pub fn run(args: DevicesArgs) -> anyhow::Result<()> {
    let row = |kind: DeviceKind| {
        let (name, missing) = match kind.describe() {
            Ok(name) => (Some(name), None),
            Err(e) => (None, Some(e.to_string())),
        };
        Row { device: kind.to_string(), name, missing }
    };
    let devices: Vec<Row> = DeviceKind::ALL.map(row).into();
    let line = |row: &Row| {
        let what = row.name.as_deref().or(row.missing.as_deref()).unwrap_or_default();
        format!("{:<6} {what}", row.device)
    };
    let lines = devices.iter().map(line).collect::<Vec<_>>().join("\n");
    program::tell(&lines, args.json)?;
    if args.json { program::report(&Report { devices }) } else { Ok(()) }
}
