//! Who may import whom. The table below is the one in docs/ARCHITECTURE.md; declared dependencies are compared with it,
//! and every library is compiled alone without its default features, because a workspace build unifies features and
//! would hide a core that needs its service.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::ci::{cargo, metadata, output, target_dir};

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
    Layer { name: "veri-verify", core: &["swarm-wire"], features: &["parallax-model"] },
    Layer {
        name: "echo-rollout",
        core: &["swarm-wire"],
        features: &["swarm-sim", "lattica-net", "lattica-bitswap", "parallax-engine", "veri-verify"],
    },
    Layer {
        name: "echo-trainer",
        core: &["swarm-wire", "parallax-model", "echo-rollout"],
        features: &["lattica-net", "lattica-bitswap"],
    },
];

/// What a library must not pull in with just these features: runtimes, sockets, tensor libraries where the engine must
/// stay free of them.
const FORBIDDEN: &[(&str, &str, &[&str])] = &[
    ("swarm-wire", "", &["tokio", "libp2p", "burn"]),
    ("swarm-sim", "", &["tokio", "libp2p", "burn"]),
    ("parallax-kernels", "", &["tokio", "libp2p", "burn"]),
    ("parallax-model", "", &["tokio", "libp2p"]),
    ("lattica-net", "", &["tokio", "libp2p", "burn"]),
    ("lattica-bitswap", "", &["tokio", "libp2p", "burn"]),
    ("parallax-sched", "", &["tokio", "libp2p", "burn"]),
    ("parallax-engine", "", &["tokio", "libp2p", "burn"]),
    ("veri-verify", "", &["tokio", "libp2p", "burn"]),
    ("echo-rollout", "", &["tokio", "libp2p", "burn"]),
    ("echo-rollout", "collector", &["parallax-engine", "parallax-model"]),
    ("echo-trainer", "", &["tokio", "libp2p"]),
    ("echo-trainer", "service", &["parallax-engine"]),
    ("echo-trainer", "gateway", &["parallax-engine"]),
];

/// What an application that embeds the engine must not pull in.
const NETWORK: &[&str] = &["libp2p", "quinn", "hyper", "axum", "reqwest", "lattica-net", "lattica-bitswap"];

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
    for (name, features, forbidden) in FORBIDDEN {
        let tree = tree(root, name, features)?;
        if let Some(found) = forbidden.iter().find(|f| tree.contains(**f)) {
            bail!("{name} with only the features '{features}' pulls in {found}");
        }
    }
    standalone(root)
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
    let metadata = metadata(root)?;
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

/// Names of all crates that a package needs to run with just these features.
fn tree(root: &Path, name: &str, features: &str) -> Result<BTreeSet<String>> {
    let of = ["tree", "-p", name, "--no-default-features", "--features", features];
    let text =
        output(root, "cargo", &[&of[..], &["-e", "normal", "--prefix", "none", "--format", "{p}"]].concat())?;
    Ok(text.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}

/// Checks the embedding example as an application of its own, outside the workspace, and looks for network code in it.
/// Not built: other features than the workspace's would have Burn compiled and optimised once more, minutes of two cores in
/// a gate that takes an hour; the tests before have built and linked the same example.
fn standalone(root: &Path) -> Result<()> {
    let target = target_dir(root)?;
    let dir = target.join("standalone");
    let crates = root.join("crates");
    let manifest = format!(
        "[package]\nname = \"standalone\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         anyhow = \"1\"\ntokio = {{ version = \"1\", features = [\"rt-multi-thread\"] }}\n\
         parallax-engine = {{ path = '{0}/parallax-engine', features = [\"local\", \"service\"] }}\n\
         parallax-model = {{ path = '{0}/parallax-model' }}\n",
        crates.display()
    );
    fs::create_dir_all(dir.join("src")).context("making the standalone package")?;
    fs::write(dir.join("Cargo.toml"), manifest).context("writing the standalone package")?;
    for (from, to) in [("Cargo.lock", "Cargo.lock"), ("examples/src/bin/embed-engine.rs", "src/main.rs")] {
        fs::copy(root.join(from), dir.join(to)).with_context(|| format!("copying {from}"))?;
    }
    let target = target.to_str().context("the target directory's name is no text")?;
    cargo(&dir, &["check", "--release", "--quiet", "--target-dir", target], &[])?;
    let names = tree(&dir, "standalone", "")?;
    if let Some(found) = NETWORK.iter().find(|n| names.contains(**n)) {
        bail!("an application with the engine inside pulls in {found}");
    }
    Ok(())
}
