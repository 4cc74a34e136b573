//! Who may import whom. The table below is the one in docs/ARCHITECTURE.md; declared dependencies are compared with it,
//! and every library is compiled alone without its default features, because a workspace build unifies features and
//! would hide a core that needs its service.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::ci::cargo;

/// A library, what its core may import, and what any of its features may import in addition.
struct Layer {
    name: &'static str,
    core: &'static [&'static str],
    features: &'static [&'static str],
}

const LAYERS: &[Layer] = &[
    Layer { name: "swarm-wire", core: &[], features: &[] },
    Layer { name: "swarm-sim", core: &[], features: &[] },
    Layer { name: "parallax-kernels", core: &[], features: &[] },
    Layer { name: "parallax-model", core: &["parallax-kernels"], features: &[] },
    Layer { name: "lattica-net", core: &["swarm-wire"], features: &[] },
    Layer { name: "lattica-bitswap", core: &["swarm-wire"], features: &["lattica-net"] },
    Layer { name: "parallax-sched", core: &["swarm-wire"], features: &["lattica-net"] },
    Layer {
        name: "parallax-engine",
        core: &["swarm-wire", "parallax-sched"],
        features: &["parallax-model", "lattica-net", "lattica-bitswap"],
    },
    Layer {
        name: "veri-verify",
        core: &["swarm-wire", "parallax-model"],
        features: &["lattica-net", "parallax-engine"],
    },
    Layer {
        name: "echo-rollout",
        core: &["swarm-wire"],
        features: &["lattica-net", "lattica-bitswap", "parallax-engine", "veri-verify"],
    },
    Layer {
        name: "echo-trainer",
        core: &["swarm-wire", "parallax-model", "echo-rollout"],
        features: &["lattica-net", "lattica-bitswap"],
    },
];

/// What a core must not pull in when its features are off: runtimes, sockets, tensor libraries where the engine must
/// stay free of them.
const FORBIDDEN_IN_CORES: &[(&str, &[&str])] = &[
    ("swarm-wire", &["tokio", "libp2p", "burn"]),
    ("swarm-sim", &["tokio", "libp2p", "burn"]),
    ("parallax-kernels", &["tokio", "libp2p", "burn"]),
    ("parallax-model", &["tokio", "libp2p"]),
    ("lattica-net", &["tokio", "libp2p", "burn"]),
    ("lattica-bitswap", &["tokio", "libp2p", "burn"]),
    ("parallax-sched", &["tokio", "libp2p", "burn"]),
    ("parallax-engine", &["tokio", "libp2p", "burn"]),
    ("veri-verify", &["tokio", "libp2p"]),
    ("echo-rollout", &["tokio", "libp2p", "burn"]),
    ("echo-trainer", &["tokio", "libp2p"]),
];

/// Compares the declared dependencies with the table; unless `declared_only`, also compiles every core alone.
pub(crate) fn run(root: &Path, declared_only: bool) -> Result<()> {
    let packages = packages(root)?;
    let ours: BTreeSet<&str> = LAYERS.iter().map(|l| l.name).collect();
    let mut faults = Vec::new();
    for layer in LAYERS {
        let Some(dependencies) = packages.get(layer.name) else { bail!("there is no crate {}", layer.name) };
        for dependency in dependencies.iter().filter(|d| d.ours(&ours)) {
            let allowed_in_core = layer.core.contains(&dependency.name.as_str());
            let allowed = allowed_in_core
                || (dependency.optional && layer.features.contains(&dependency.name.as_str()));
            let for_tests = dependency.dev && dependency.name == "swarm-sim";
            if !allowed && !for_tests {
                faults.push(format!("{} must not import {}", layer.name, dependency.name));
            }
        }
        if !dependencies.iter().any(|d| d.name == "parallax-kernels") || layer.name == "parallax-model" {
            continue;
        }
        faults.push(format!("{} reaches past parallax-model to the kernels", layer.name));
    }
    for (name, dependencies) in &packages {
        let imports_outside =
            |d: &&Dependency| matches!(d.name.as_str(), "swarm-examples" | "swarm-tests" | "swarm-benches");
        if let Some(d) = dependencies.iter().find(imports_outside).filter(|_| name != "swarm-tests") {
            faults.push(format!(
                "{name} must not import {}: nothing imports examples, tests or benches",
                d.name
            ));
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    if declared_only {
        return Ok(());
    }
    for layer in LAYERS {
        cargo(root, &["check", "--release", "--quiet", "-p", layer.name, "--no-default-features"], &[])?;
    }
    for (name, forbidden) in FORBIDDEN_IN_CORES {
        let tree = core_tree(root, name)?;
        if let Some(found) = forbidden.iter().find(|f| tree.contains(**f)) {
            bail!("the core of {name} (no default features) pulls in {found}");
        }
    }
    Ok(())
}

struct Dependency {
    name: String,
    optional: bool,
    dev: bool,
}

impl Dependency {
    fn ours(&self, names: &BTreeSet<&str>) -> bool {
        names.contains(self.name.as_str())
    }
}

fn packages(root: &Path) -> Result<BTreeMap<String, Vec<Dependency>>> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("reading cargo metadata")?;
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let list = metadata["packages"].as_array().context("cargo metadata without packages")?;
    Ok(list
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().into_iter().flatten();
            let dependencies = dependencies
                .map(|d| Dependency {
                    name: text(&d["name"]),
                    optional: d["optional"].as_bool().unwrap_or(false),
                    dev: d["kind"] == "dev",
                })
                .collect();
            (text(&package["name"]), dependencies)
        })
        .collect())
}

/// Names of all crates that a library's core needs to run.
fn core_tree(root: &Path, name: &str) -> Result<BTreeSet<String>> {
    let output = Command::new("cargo")
        .args([
            "tree",
            "-p",
            name,
            "--no-default-features",
            "-e",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .current_dir(root)
        .output()
        .context("running cargo tree")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}
