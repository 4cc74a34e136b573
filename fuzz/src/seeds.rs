//! Writes the seeds of every decoder into a folder, one folder below it for each, and prints a line for each: its name,
//! its longest input in bytes, its largest allocation in MiB.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its user")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs, io};

use swarm_fuzz::DECODERS;

fn main() -> ExitCode {
    let Some(folder) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("name the folder into which seeds are to be written");
        return ExitCode::FAILURE;
    };
    let write = || -> io::Result<()> {
        for decoder in DECODERS {
            let folder = folder.join(decoder.name);
            println!("{} {} {}", decoder.name, decoder.input_max_bytes, decoder.allocation_max_mb);
            fs::create_dir_all(&folder)?;
            for (n, seed) in (decoder.seeds)().into_iter().enumerate() {
                fs::write(folder.join(format!("seed-{n}")), seed)?;
            }
        }
        Ok(())
    };
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}
