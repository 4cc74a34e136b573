//! A run that trains all weights and is audited, as separate programs: learner, auditor, an honest worker, and one that rounds its
//! weights. The latter is found out with the very version that it was given, a whole model, and anybody can repeat that.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::program::Program;

const AUDIT: &str = env!("CARGO_BIN_EXE_veri-audit");
const NETWORK: [&str; 2] = ["--network", "audits-test"];

/// A learner that makes so many steps, with its address; a run that is there goes on.
fn learner(dir: &Path, auditor: &str, steps: u64) -> (Program, String) {
    let config = dir.join("run.toml");
    let settings = format!(
        "dir = \"{0}/run\"\nthreads = 1\n[node]\nidentity = \"{0}/learner.key\"\nnetwork = \"audits-test\"\n\
         [run]\nseed = 7\neval_tasks = 4\nauditors = [\"{auditor}\"]\naudit_fraction = 1.0\n\
         [run.trainer]\nsteps = {steps}\ngroups_per_step = 2\ngroup_size = 4\nfull = true\n\
         [run.trainer.optim]\nlearning_rate = 1e-3\n",
        dir.display()
    );
    std::fs::write(&config, settings).unwrap();
    let args = ["--config", config.to_str().unwrap(), "--json"];
    let mut learner = Program::start(env!("CARGO_BIN_EXE_training-swarm"), &args);
    let ready = learner.next().expect("the learner gets ready");
    (learner, ready["addrs"][0].as_str().unwrap().to_owned())
}

/// A worker with weights in this format.
fn worker(address: &str, dtype: &str) -> Program {
    let args = ["--trainer", address, "--dtype", dtype, "--cache-tokens", "1024", "--json"];
    Program::start(env!("CARGO_BIN_EXE_rollout-fleet"), &[&args[..], &NETWORK].concat())
}

fn check(args: &[&str]) -> Output {
    Command::new(AUDIT).args([&["check", "--model", "tiny", "--json"][..], args].concat()).output().unwrap()
}

#[test]
fn all_weights_are_audited_in_the_version_that_a_worker_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (key, evidence) = (path("auditor.key"), path("evidence"));
    let mut shown = Program::start(AUDIT, &["run", "--identity", &key, "--show-peer", "--json"]);
    let peer = shown.next().unwrap()["peer"].as_str().unwrap().to_owned();
    let audit = |address: &str| {
        let args = ["run", "--trainer", address, "--identity", &key, "--evidence", &evidence];
        let args = [&args[..], &["--threads", "1", "--json"], &NETWORK].concat();
        Program::start(AUDIT, &args)
    };
    // The base model's rollouts make the first version.
    let (mut first, address) = learner(dir.path(), &peer, 1);
    let (mut auditor, mut honest) = (audit(&address), worker(&address, "f32"));
    let (lines, done) = first.end();
    assert!(done && lines.last().unwrap()["versions"] == 1, "{lines:?}");
    assert!(honest.end().1);
    let (verdicts, done) = auditor.end();
    assert!(done, "{verdicts:?}");
    let verdicts: Vec<&Value> = verdicts.iter().filter(|line| line["event"] == "verdict").collect();
    assert!(verdicts.len() >= 8 && verdicts.iter().all(|v| v["verdict"] == "pass"), "{verdicts:?}");

    // Who samples with that version in four bits is sent away; then the honest one makes the step.
    let (mut second, address) = learner(dir.path(), &peer, 2);
    let (mut auditor, mut liar) = (audit(&address), worker(&address, "q4_0"));
    let (last, done) = liar.end();
    assert!(
        !done && last.last().unwrap()["ended"][0].as_str().unwrap().contains("failed an audit"),
        "{last:?}"
    );
    let mut honest = worker(&address, "f32");
    let (lines, done) = second.end();
    assert!(done && honest.end().1, "{lines:?}");
    let liar = lines.iter().find(|line| line["event"] == "convicted").expect("it is named")["peer"].clone();
    let summary = lines.last().unwrap();
    let counts = &summary["trajectories"];
    assert_eq!((&summary["versions"], &counts["consumed"]), (&2.into(), &16.into()), "{summary}");
    assert_eq!((&counts["lost"], &counts["duplicated"]), (&0.into(), &0.into()), "{summary}");
    assert!(counts["rejected"].as_u64() >= Some(1) && counts["unproven"].is_u64(), "{summary}");
    let (verdicts, done) = auditor.end();
    assert!(done, "{verdicts:?}");
    let of = |verdict: &str| verdicts.iter().filter(|line| line["verdict"] == verdict).collect::<Vec<_>>();
    let passed = of("pass");
    assert!(passed.len() >= 8, "{verdicts:?}");
    for pass in passed {
        assert_eq!(
            (&pass["version"], &pass["reason"]),
            (&1.into(), &"all opened rows equal bit for bit".into()),
            "{pass}"
        );
    }
    let convictions = of("fail");
    let conviction = convictions[0];
    assert_eq!((&conviction["version"], &conviction["worker"]), (&1.into(), &liar), "{conviction}");

    // Anybody comes to the same verdict, with the file of that version and no other.
    let proof = conviction["evidence"].as_str().unwrap();
    let weights = conviction["weights"].as_str().unwrap();
    let again = check(&["--evidence", proof, "--weights", weights]);
    let report: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((&report["verdict"], &report["worker"]), (&"fail".into(), &liar), "{report}");
    let said = |args: &[&str]| {
        let output = check(args);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let without = said(&["--evidence", proof]);
    assert!(without.contains("name their file with --weights"), "{without}");
    let other = said(&["--evidence", proof, "--weights", proof]);
    assert!(other.contains("is another file than the one that the evidence names"), "{other}");
}
