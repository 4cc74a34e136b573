//! A learner, a worker and assistants as separate programs, as on four machines: `training-swarm --config`, `rollout-fleet`,
//! `training-swarm assist`. One assistant is killed in the middle of the run; what is learnt is what one process learns.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::program::Program;

const SWARM: &str = env!("CARGO_BIN_EXE_training-swarm");
const NETWORK: [&str; 2] = ["--network", "assistants-test"];

/// What one process makes of these settings: its adapter.
fn solo(dir: &Path, run: &str, trainer: &str) -> Vec<u8> {
    let (config, out) = (dir.join("solo.toml"), dir.join("solo"));
    std::fs::write(&config, format!("[run]\nseed = 7\n{run}\n[run.trainer]\n{trainer}\n")).unwrap();
    let args = ["solo", "--config", config.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json"];
    let mut alone = Program::start(SWARM, &args);
    let (lines, done) = alone.end();
    let report = lines.last().unwrap();
    assert!(done, "{report}");
    std::fs::read(report["adapter"].as_str().unwrap()).unwrap()
}

#[test]
fn assistants_change_no_bit_and_one_that_is_killed_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let keys = [path("one.key"), path("two.key")];
    let peer = |key: &String| {
        let mut shown = Program::start(SWARM, &["assist", "--identity", key, "--show-peer", "--json"]);
        let peer = shown.next().unwrap()["peer"].as_str().unwrap().to_owned();
        assert!(shown.end().1);
        peer
    };
    let peers = [peer(&keys[0]), peer(&keys[1])];
    let run = format!("eval_tasks = 4\nassistants = [\"{}\", \"{}\"]", peers[0], peers[1]);
    let trainer = "steps = 5\ngroups_per_step = 3\ngroup_size = 4";
    let settings = format!(
        "dir = \"{0}/run\"\nthreads = 1\n[node]\nidentity = \"{0}/learner.key\"\nnetwork = \"assistants-test\"\n\
         [run]\nseed = 7\n{run}\n[run.trainer]\n{trainer}\n",
        dir.path().display()
    );
    std::fs::write(path("run.toml"), settings).unwrap();
    let mut learner = Program::start(SWARM, &["--config", &path("run.toml"), "--json"]);
    let ready = learner.until("ready");
    let address = ready["addrs"][0].as_str().unwrap().to_owned();
    let assist = |key: &str| {
        let args = ["assist", "--trainer", &address, "--identity", key, "--threads", "1", "--json"];
        Program::start(SWARM, &[&args[..], &NETWORK].concat())
    };
    // One that nobody named is refused, with what to write where.
    let stranger = path("stranger.key");
    let refused = Command::new(SWARM)
        .args([&["assist", "--trainer", &address, "--identity", &stranger][..], &NETWORK].concat())
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("run.assistants"), "{said}");

    let (mut one, mut two) = (assist(&keys[0]), assist(&keys[1]));
    for assistant in [&mut one, &mut two] {
        assert_eq!(assistant.until("holds")["version"], 0);
    }
    let worker = [&["--trainer", &address, "--json"][..], &NETWORK].concat();
    let mut worker = Program::start(env!("CARGO_BIN_EXE_rollout-fleet"), &worker);
    let first = learner.until("step");
    assert_eq!((&first["version"], &first["assisted"]), (&1.into(), &2.into()), "{first}");
    drop(one);

    let (lines, ended) = learner.end();
    assert!(ended, "{lines:?}");
    let steps: Vec<&Value> = lines.iter().filter(|line| line["event"] == "step").collect();
    assert_eq!((steps.len(), &steps[3]["assisted"]), (4, &1.into()), "{lines:?}");
    let left_out = lines.iter().find(|line| line["event"] == "left_out").expect("somebody is missed");
    assert_eq!((&left_out["peer"], &left_out["dismissed"]), (&peers[0].as_str().into(), &false.into()));
    // The other one has the last weights, and hears that the run is over; so does the worker.
    let done = two.until("done");
    assert_eq!((&done["version"], two.end().1), (&5.into(), true), "{done}");
    assert!(done["shares"].as_u64().unwrap() >= 5, "{done}");
    let (lines, ended) = worker.end();
    assert!(ended && !lines.is_empty(), "{lines:?}");

    let learnt = std::fs::read(dir.path().join("run/adapter.safetensors")).unwrap();
    assert!(
        learnt == solo(dir.path(), "eval_tasks = 4", &format!("{trainer}\nreplicas = 3")),
        "as three replicas"
    );
    assert!(learnt == solo(dir.path(), &run, trainer), "as one process with the same settings");
}
