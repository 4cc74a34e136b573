//! Generates the prost messages of swarm-wire from proto/ with protox, a protobuf compiler in Rust: no protoc needed.
//! The result is committed; `--check` (part of ci) proves that it is current.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};

/// Regenerates, or with `check` compares, `crates/swarm-wire/src/generated`.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let proto_dir = root.join("proto");
    let mut protos = Vec::new();
    find_protos(&proto_dir, &mut protos).context("listing proto/")?;
    protos.sort();
    let descriptors = protox::compile(&protos, [&proto_dir]).map_err(|e| anyhow::anyhow!("{e:?}"))?;

    let out = tempfile::tempdir()?;
    prost_build::Config::new()
        .out_dir(out.path())
        .bytes(["."])
        .compile_fds(descriptors)
        .context("generating Rust from proto/")?;

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(out.path())? {
        let path = entry?.path();
        let name = path.file_name().expect("a listed file has a name").to_string_lossy().into_owned();
        files.insert(name, format(&path)?);
    }
    let module_list = out.path().join("generated.rs");
    fs::write(&module_list, modules(files.keys()))?;
    let module_list = format(&module_list)?;

    let src = root.join("crates/swarm-wire/src");
    let mut written = vec![(src.join("generated.rs"), module_list)];
    written.extend(files.into_iter().map(|(name, text)| (src.join("generated").join(name), text)));
    if check {
        for (path, text) in &written {
            let committed = fs::read_to_string(path).unwrap_or_default();
            ensure!(committed == *text, "{} differs from proto/: run `cargo xtask codegen`", path.display());
        }
        return Ok(());
    }
    fs::create_dir_all(src.join("generated"))?;
    for entry in fs::read_dir(src.join("generated"))? {
        fs::remove_file(entry?.path())?;
    }
    for (path, text) in written {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn find_protos(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            find_protos(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            found.push(path);
        }
    }
    Ok(())
}

/// The module tree: package `lattica.v1` in `generated/lattica.v1.rs` becomes `generated::lattica::v1`.
fn modules<'a>(files: impl Iterator<Item = &'a String>) -> String {
    let mut text = String::from(
        "//! prost messages, one module per protobuf package. Written by `cargo xtask codegen` from proto/: do not edit.\n\
         #![allow(missing_docs, unused_qualifications, unreachable_pub, clippy::all, clippy::pedantic, reason = \"generated code\")]\n",
    );
    for file in files {
        let package: Vec<&str> = file.trim_end_matches(".rs").split('.').collect();
        for part in &package {
            let _ = write!(text, "pub mod {part} {{ ");
        }
        let _ = write!(text, "include!(\"generated/{file}\"); ");
        text.push_str(&"}".repeat(package.len()));
        text.push('\n');
    }
    text
}

fn format(path: &Path) -> Result<String> {
    let done =
        Command::new("rustfmt").args(["--edition", "2024"]).arg(path).output().context("running rustfmt")?;
    if !done.status.success() {
        bail!("rustfmt on {}: {}", path.display(), String::from_utf8_lossy(&done.stderr));
    }
    Ok(fs::read_to_string(path)?)
}
