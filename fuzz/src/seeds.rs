//! Writes the seeds of every decoder into a folder, one folder below it for each.
#![expect(clippy::print_stderr, reason = "a command line tool talks to its user")]

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
