//! A learner and rollout workers as separate programs, as on two machines: `training-swarm --config` and `rollout-fleet`
//! with the address that it prints. Stopped after two steps, the run goes on with the third. In the asynchronous mode they learn
//! as well, and a learner that is killed at any moment goes on where it was. What is played may be a program in Python.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::{BufRead as _, BufReader, Lines};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use serde_json::Value;

/// A program whose stdout is read line by line; it does not outlive the test.
struct Program {
    process: Process,
    lines: Lines<BufReader<ChildStdout>>,
}

/// A process that ends with the first of its clones that goes.
#[derive(Clone)]
struct Process(Arc<Mutex<Child>>);

impl Process {
    /// Waits for its end; true when it had done what it was to do.
    fn succeeds(&self) -> bool {
        self.0.lock().unwrap().wait().unwrap().success()
    }
}

impl Drop for Process {
    /// SIGKILL: it can neither finish nor tidy up.
    fn drop(&mut self) {
        let mut child = self.0.lock().unwrap();
        // One that has ended needs neither.
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Program {
    fn start(binary: &str, args: &[&str]) -> Self {
        let mut command = Command::new(binary);
        let mut child = command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { process: Process(Arc::new(Mutex::new(child))), lines }
    }

    /// The next line; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        self.lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }
}

/// A learner with these settings.
fn learner(dir: &Path, run: &str, trainer: &str) -> Program {
    learner_at(dir, "", run, trainer)
}

/// A learner with these settings and a place in the network.
fn learner_at(dir: &Path, node: &str, run: &str, trainer: &str) -> Program {
    let config = dir.join("run.toml");
    let settings = format!(
        "dir = \"{0}/run\"\nthreads = 1\n[node]\nidentity = \"{0}/learner.key\"\nnetwork = \"training-swarm-test\"\n{node}\n\
         [run]\nseed = 7\nworkers = 2\n{run}\n[run.trainer]\n{trainer}\n",
        dir.display()
    );
    std::fs::write(&config, settings).unwrap();
    let args = ["--config", config.to_str().unwrap(), "--json"];
    Program::start(env!("CARGO_BIN_EXE_training-swarm"), &args)
}

/// Two workers with these options for the learner that says it is `ready`; the same ones each time in one directory.
fn fleet(dir: &Path, ready: &Value, options: &[&str]) -> Program {
    let (address, keys) = (ready["addrs"][0].as_str().unwrap(), dir.join("keys"));
    let fleet = [
        "--trainer",
        address,
        "--network",
        "training-swarm-test",
        "--workers",
        "2",
        "--keys",
        keys.to_str().unwrap(),
        "--cache-tokens",
        "1024",
        "--json",
    ];
    Program::start(env!("CARGO_BIN_EXE_rollout-fleet"), &[&fleet, options].concat())
}

/// Runs a learner with these settings and workers with these options; all lines of the learner.
fn run(dir: &Path, run: &str, trainer: &str, options: &[&str]) -> Vec<Value> {
    let mut learner = learner(dir, run, trainer);
    let ready = learner.next().expect("the learner gets ready");
    let mut fleet = fleet(dir, &ready, options);
    let lines: Vec<Value> = std::iter::from_fn(|| learner.next()).collect();
    assert!(learner.process.succeeds(), "{lines:?}");
    // The workers hear it from the learner; they do not wait for one that is gone.
    let last = std::iter::from_fn(|| fleet.next()).last().unwrap();
    assert!(fleet.process.succeeds(), "{last}");
    assert_eq!(last["ended"], serde_json::json!(["the run is finished", "the run is finished"]));
    lines
}

#[test]
fn a_private_swarm_takes_workers_with_its_key_and_tells_the_others_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let key = |name: &str| {
        let path = dir.path().join(name);
        lattica_net::create_swarm_key(&path).unwrap();
        path.display().to_string()
    };
    let (ours, another) = (key("swarm.key"), key("another.key"));
    // A relay, and a loss by name that holds the policy near the model on two projections.
    let node = format!("swarm_key = \"{ours}\"\nrelay = true");
    let trainer = "steps = 2\ngroups_per_step = 3\ngroup_size = 4\nlora_targets = [\"q_proj\", \"v_proj\"]\n\
                   [run.trainer.loss]\npreset = \"dapo\"\nsurrogate = { high = 0.3 }\nkl = { weight = 0.1 }";
    let mut learner = learner_at(dir.path(), &node, "eval_tasks = 4", trainer);
    let ready = learner.next().expect("the learner gets ready");
    let address = ready["addrs"][0].as_str().unwrap();
    let refused = |options: &[&str]| {
        let args = ["--trainer", address, "--network", "training-swarm-test", "--patience-s", "5"];
        let binary = env!("CARGO_BIN_EXE_rollout-fleet");
        let output = Command::new(binary).args([&args[..], options].concat()).output().unwrap();
        assert!(!output.status.success(), "{options:?} got in");
        String::from_utf8(output.stderr).unwrap()
    };
    let stranger = refused(&[]);
    assert!(stranger.contains("private swarm") && stranger.contains("--swarm-key"), "{stranger}");
    let other = refused(&["--swarm-key", &another]);
    assert!(other.contains("its swarm key or network name is not ours"), "{other}");

    let mut fleet = fleet(dir.path(), &ready, &["--swarm-key", &ours, "--via", address]);
    let lines: Vec<Value> = std::iter::from_fn(|| learner.next()).collect();
    let last = std::iter::from_fn(|| fleet.next()).last().unwrap();
    assert!(learner.process.succeeds() && fleet.process.succeeds(), "{lines:?} {last}");
    assert_eq!(lines.last().unwrap()["trajectories"]["consumed"], 2 * 3 * 4, "{lines:?}");
    let adapter = std::fs::read(dir.path().join("run/adapter.safetensors")).unwrap();
    let names = String::from_utf8_lossy(&adapter).into_owned();
    assert!(
        names.contains("q_proj") && names.contains("v_proj") && !names.contains("o_proj"),
        "only its targets"
    );
}

/// When a learner is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// It has said this.
    Said(&'static str),
    /// It has put this file of the run in place.
    Replaced(&'static str),
    /// So many writes into the log of rollouts since the workers were started: any part of a commit.
    Wrote(usize),
}

impl Moment {
    /// Waits for it, by what the learner says or by what the kernel tells of its directory; true when the learner was faster.
    fn wait(self, changes: OwnedFd, learner: &mut Program) -> bool {
        let (file, kind, mut times) = match self {
            Self::Said(event) => {
                return !std::iter::from_fn(|| learner.next()).any(|line| line["event"] == event);
            }
            Self::Replaced(file) => (file, ReadFlags::MOVED_TO, 1),
            Self::Wrote(times) => (LOG, ReadFlags::MODIFY, times),
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut changes = inotify::Reader::new(changes, &mut buffer);
        while times > 0 {
            let change = changes.next().unwrap();
            let of = |name: &str| change.file_name().is_some_and(|n| n.to_bytes() == name.as_bytes());
            times -= usize::from(change.events().contains(kind) && of(file));
            // The log is open for as long as the learner lives.
            if change.events().contains(ReadFlags::CLOSE_WRITE) && of(LOG) {
                return true;
            }
        }
        false
    }
}

/// Name of the log of rollouts in a run's directory.
const LOG: &str = "rollouts.redb";

/// What happens to the files of the run in `dir` from now on.
fn changes(dir: &Path) -> OwnedFd {
    let changes = inotify::init(CreateFlags::CLOEXEC).unwrap();
    let kinds = WatchFlags::MODIFY | WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE;
    inotify::add_watch(&changes, dir.join("run"), kinds).unwrap();
    changes
}

/// Kills a learner, and its workers with it, at each of these moments, then lets one run to its end; its lines.
fn killed_at(dir: &Path, settings: [&str; 2], moments: &[Moment]) -> Vec<Value> {
    let [run_settings, trainer] = settings;
    for moment in moments {
        let mut learner = learner(dir, run_settings, trainer);
        let ready = learner.next().expect("the learner gets ready");
        let changes = changes(dir);
        let Program { process: workers, lines } = fleet(dir, &ready, &[]);
        // A learner would wait for other workers when these are gone, and the test with it.
        let learning = learner.process.clone();
        let watch = std::thread::spawn(move || {
            lines.for_each(drop);
            drop(learning);
        });
        assert!(!moment.wait(changes, &mut learner), "learner or workers were gone before {moment:?}");
        drop(learner);
        drop(workers);
        watch.join().unwrap();
    }
    run(dir, run_settings, trainer, &[])
}

const MOMENTS: [Moment; 7] = [
    Moment::Wrote(1),
    Moment::Said("eval"),
    Moment::Wrote(10),
    Moment::Said("step"),
    Moment::Replaced("adapter.safetensors"),
    Moment::Wrote(25),
    Moment::Replaced("adapter.safetensors"),
];

#[test]
fn a_learner_that_is_killed_again_and_again_ends_where_an_undisturbed_one_does() {
    let (killed, left_alone) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings = ["eval_tasks = 4", "steps = 6\ngroups_per_step = 3\ngroup_size = 4"];
    let lines = killed_at(killed.path(), settings, &MOMENTS);
    let undisturbed = run(left_alone.path(), settings[0], settings[1], &[]);
    let (summary, other) = (lines.last().unwrap(), undisturbed.last().unwrap());
    for summary in [summary, other] {
        let counts = &summary["trajectories"];
        assert_eq!(
            (&summary["versions"], &counts["consumed"]),
            (&6.into(), &(6 * 3 * 4).into()),
            "{summary}"
        );
        assert_eq!((&counts["lost"], &counts["duplicated"]), (&0.into(), &0.into()), "{summary}");
    }
    assert_eq!(
        (&summary["eval_after"], &summary["reward_after"]),
        (&other["eval_after"], &other["reward_after"])
    );
    let state = |dir: &Path| {
        let mut files: Vec<_> =
            std::fs::read_dir(dir.join("run")).unwrap().map(|f| f.unwrap().path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        files
            .iter()
            .map(|f| (f.file_name().unwrap().to_owned(), std::fs::read(f).unwrap()))
            .collect::<Vec<_>>()
    };
    let (killed, left_alone) = (state(killed.path()), state(left_alone.path()));
    assert!(killed.len() > 1, "the adapter, and weights with moments");
    assert!(killed == left_alone, "the same weights and moments, bit for bit");
}

#[test]
fn an_asynchronous_learner_that_is_killed_trains_nothing_twice_or_too_old() {
    let dir = tempfile::tempdir().unwrap();
    let settings = [
        "mode = \"async\"\neval_tasks = 4",
        "steps = 8\ngroups_per_step = 4\ngroup_size = 4\nmax_staleness = 2",
    ];
    let moments = [Moment::Wrote(15), Moment::Said("step"), Moment::Replaced("adapter.safetensors")];
    let lines = killed_at(dir.path(), settings, &moments);
    let summary = lines.last().unwrap();
    let counts = &summary["trajectories"];
    assert_eq!((&summary["versions"], &counts["consumed"]), (&8.into(), &(8 * 4 * 4).into()), "{summary}");
    assert_eq!((&counts["lost"], &counts["duplicated"]), (&0.into(), &0.into()), "{summary}");
    assert!(summary["staleness"]["max"].as_u64().unwrap() <= 2, "{summary}");
}

#[test]
fn workers_elsewhere_train_the_learner_and_a_stopped_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let steps_up_to = |n: u64| format!("steps = {n}\ngroups_per_step = 3\ngroup_size = 4");
    let steps = |lines: &[Value]| -> Vec<u64> {
        let steps = lines.iter().filter(|l| l["event"] == "step");
        steps.map(|l| l["version"].as_u64().unwrap()).collect()
    };
    let first = run(dir.path(), "eval_tasks = 4", &steps_up_to(2), &[]);
    assert_eq!(steps(&first), [1, 2]);
    for step in first.iter().filter(|l| l["event"] == "step") {
        assert_eq!(
            (&step["ratio_deviation_max"], &step["staleness_max"]),
            (&0.0.into(), &0.into()),
            "{step}"
        );
    }
    let summary = first.last().unwrap();
    assert_eq!(summary["versions"], 2);
    assert_eq!(summary["trajectories"]["consumed"], 2 * 3 * 4, "{summary}");
    for nothing in ["lost", "duplicated", "rejected"] {
        assert_eq!(summary["trajectories"][nothing], 0, "{summary}");
    }
    assert!(dir.path().join("run/adapter.safetensors").is_file());

    let second = run(dir.path(), "eval_tasks = 4", &steps_up_to(3), &[]);
    assert_eq!(second[0]["version"], 2, "it goes on with the weights of its checkpoint: {}", second[0]);
    assert_eq!(second[0]["eval"], summary["eval_after"], "the same weights, the same answers");
    assert_eq!(steps(&second), [3]);
    let summary = second.last().unwrap();
    assert_eq!(
        (&summary["versions"], &summary["trajectories"]["consumed"]),
        (&3.into(), &(3 * 3 * 4).into())
    );
    assert_eq!(summary["env"], "arithmetic");
    learns_what_one_process_learns(dir.path(), ["eval_tasks = 4", &steps_up_to(3)], summary);
}

#[test]
fn groups_of_equal_rewards_are_replaced_as_in_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let trainer =
        "steps = 3\ngroups_per_step = 3\ngroup_size = 4\ndynamic_sampling = true\nmax_flat_groups = 6";
    let settings = ["eval_tasks = 4", trainer];
    let lines = run(dir.path(), settings[0], settings[1], &[]);
    let summary = lines.last().unwrap();
    let number = |value: &Value| value.as_u64().unwrap();
    let flat: u64 = lines.iter().filter(|l| l["event"] == "step").map(|l| number(&l["flat_groups"])).sum();
    assert!(flat > 0, "a model that knows little often fails a whole group: {summary}");
    let counts = &summary["trajectories"];
    assert_eq!(
        (number(&counts["consumed"]), number(&counts["dropped_flat"])),
        (3 * 3 * 4, flat * 4),
        "{summary}"
    );
    assert_eq!((number(&counts["lost"]), number(&counts["open"])), (0, 0), "{summary}");
    let alone = learns_what_one_process_learns(dir.path(), settings, summary);
    let replaced = |lines: &[Value]| -> Vec<u64> {
        lines.iter().filter(|l| l["event"] == "step").map(|l| number(&l["flat_groups"])).collect()
    };
    assert_eq!(replaced(&alone), replaced(&lines));
}

/// Says hello, and that nothing is worth anything.
const WORTHLESS: &str = r#"while read -r line; do
    id=${line#*\"id\":}
    id=${id%%[,\}]*}
    case "$line" in
        *'"op":"hello"'*) echo "{\"id\":$id,\"name\":\"worthless\"}" ;;
        *'"op":"task"'*) echo "{\"id\":$id,\"prompt\":\"Say something.\"}" ;;
        *) echo "{\"id\":$id,\"reward\":0}" ;;
    esac
done
"#;

#[test]
fn a_run_whose_groups_are_all_replaced_ends_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("worthless.sh");
    std::fs::write(&program, WORTHLESS).unwrap();
    let program = program.to_str().unwrap();
    // Replaced for hours, if that was all that ends it.
    let trainer = "steps = 2\ngroups_per_step = 2\ngroup_size = 2\nmax_completion_tokens = 4\ndynamic_sampling = true\n\
                   max_flat_groups = 10000000";
    let settings = format!("seconds = 4\neval_tasks = 2\nenvironment_program = [\"sh\", \"{program}\"]");
    let lines = run(dir.path(), &settings, trainer, &["--env-program", "sh", program]);
    let summary = lines.last().unwrap();
    assert_eq!((&summary["versions"], &summary["trajectories"]["lost"]), (&0.into(), &0.into()), "{summary}");
    let config = dir.path().join("solo.toml");
    std::fs::write(&config, format!("[run]\n{settings}\n[run.trainer]\n{trainer}\n")).unwrap();
    let out = dir.path().join("solo");
    let args = ["solo", "--config", config.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json"];
    assert_eq!(report(&args)["steps"], 0);
}

/// One process with the same settings makes the same adapter, bit for bit, and reports the same of it; all of its lines.
fn learns_what_one_process_learns(dir: &Path, [run, trainer]: [&str; 2], summary: &Value) -> Vec<Value> {
    let (config, out) = (dir.join("solo.toml"), dir.join("solo"));
    std::fs::write(&config, format!("[run]\nseed = 7\n{run}\n[run.trainer]\n{trainer}\n")).unwrap();
    let (config, out_text) = (config.to_str().unwrap(), out.to_str().unwrap());
    let lines = told(&["solo", "--config", config, "--out", out_text, "--json"]);
    let alone = lines.last().unwrap();
    for same in ["env", "eval_after", "eval_greedy_after"] {
        assert_eq!(alone[same], summary[same], "{same}: {alone} {summary}");
    }
    assert_eq!(alone["steps"], summary["versions"]);
    let file = Path::new(alone["adapter"].as_str().unwrap()).file_name().unwrap();
    let same = std::fs::read(out.join(file)).unwrap() == std::fs::read(dir.join("run").join(file)).unwrap();
    assert!(same, "the swarm learns what one process learns");
    lines
}

#[test]
fn a_game_in_python_is_played_by_a_swarm() {
    if !Command::new("python3").arg("--version").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: needs python3");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let game = concat!(env!("CARGO_MANIFEST_DIR"), "/environments/guess.py");
    let settings = [
        &*format!("eval_tasks = 6\nenvironment_program = [\"python3\", \"{game}\"]"),
        "steps = 3\ngroups_per_step = 3\ngroup_size = 4\nmax_completion_tokens = 48",
    ];
    let lines = run(dir.path(), settings[0], settings[1], &["--env-program", "python3", game]);
    let summary = lines.last().unwrap();
    assert_eq!((&summary["env"], &summary["trajectories"]["consumed"]), (&"guess".into(), &36.into()));
    learns_what_one_process_learns(dir.path(), settings, summary);

    // The same from a server, which learner and workers ask.
    let served = tempfile::tempdir().unwrap();
    let server = concat!(env!("CARGO_MANIFEST_DIR"), "/environments/serve.py");
    let mut server = Program::start("python3", &[server, "guess"]);
    let url = server.next().expect("the server says its address")["url"].as_str().unwrap().to_owned();
    let elsewhere = format!("eval_tasks = 6\nenvironment = \"{url}\"");
    let lines = run(served.path(), &elsewhere, settings[1], &["--env", &url]);
    assert_eq!(lines.last().unwrap()["env"], "guess");
    let adapter = |dir: &Path| std::fs::read(dir.join("run/adapter.safetensors")).unwrap();
    assert_eq!(adapter(served.path()), adapter(dir.path()), "the same game, the same adapter");
}

#[test]
fn all_weights_are_trained_as_in_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let trainer = "steps = 2\ngroups_per_step = 3\ngroup_size = 4\nfull = true\n[run.trainer.optim]\nlearning_rate = 1e-4";
    let settings = ["eval_tasks = 4", trainer];
    let lines = run(dir.path(), settings[0], settings[1], &[]);
    let summary = lines.last().unwrap();
    assert_eq!(summary["trajectories"]["consumed"], 24, "{summary}");
    for step in lines.iter().filter(|l| l["event"] == "step") {
        // The first is sampled with the base model, the second with what the first step made of it.
        assert_eq!(
            step["ratio_deviation_max"], 0.0,
            "workers have the learner's weights, bit for bit: {step}"
        );
        assert!(step["update_bytes"].as_u64().unwrap() > 1_000_000, "a whole model: {step}");
    }
    learns_what_one_process_learns(dir.path(), settings, summary);
    // What is there is a model.
    let made = parallax_model::Checkpoint::open(&dir.path().join("run")).unwrap();
    let base = parallax_model::Checkpoint::tiny().unwrap();
    assert_eq!(made.config().n_layers, base.config().n_layers);
    assert_ne!(made.id().unwrap(), base.id().unwrap());
    made.tokenizer().unwrap();
    // A run that is there goes on, with more steps.
    let more = run(dir.path(), settings[0], &trainer.replace("steps = 2", "steps = 3"), &[]);
    assert_eq!(more.last().unwrap()["versions"], 3);
}

#[test]
fn a_swarm_trains_an_adapter_over_weights_in_few_bits() {
    let at = |format: &str| {
        let dir = tempfile::tempdir().unwrap();
        let trainer = format!("steps = 2\ngroups_per_step = 3\ngroup_size = 4\nbase_dtype = \"{format}\"");
        let settings = ["eval_tasks = 4", trainer.as_str()];
        let lines = run(dir.path(), settings[0], settings[1], &["--base-dtype", format]);
        let steps: Vec<&Value> = lines.iter().filter(|l| l["event"] == "step").collect();
        assert_eq!(steps.len(), 2, "{lines:?}");
        for step in steps {
            assert_eq!(step["ratio_deviation_max"], 0.0, "sampled as it is learnt, bit for bit: {step}");
        }
        learns_what_one_process_learns(dir.path(), settings, lines.last().unwrap());
        std::fs::read(dir.path().join("run/adapter.safetensors")).unwrap()
    };
    let adapters = ["f32", "bf16", "q8_0"].map(at);
    assert!(
        adapters[0] == adapters[1],
        "the tiny model's weights are bf16: nothing is lost, nothing changes"
    );
    assert!(adapters[1] != adapters[2]);

    // Who has the weights in another format is told so.
    let dir = tempfile::tempdir().unwrap();
    let mut learner = learner(dir.path(), "eval_tasks = 4", "steps = 1\nbase_dtype = \"q8_0\"");
    let ready = learner.next().expect("the learner gets ready");
    let args = ["--network", "training-swarm-test", "--trainer", ready["addrs"][0].as_str().unwrap()];
    let output = Command::new(env!("CARGO_BIN_EXE_rollout-fleet")).args(args).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("with weights in q8_0"), "{said}");
}

#[test]
fn a_reward_model_judges_for_a_swarm() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/dpo.jsonl");
    let settings = format!(
        "model = \"tiny\"\ndata = \"{data}\"\n[train]\nsteps = 20\n[train.optim]\nlearning_rate = 1e-2\n"
    );
    std::fs::write(path("reward.toml"), settings).unwrap();
    let made = report(&["reward", "--config", &path("reward.toml"), "--out", &path("judge"), "--json"]);
    assert!(made["loss_after"].as_f64() < made["loss_before"].as_f64(), "{made}");
    let judged = format!("judged@arithmetic:{}", path("judge"));
    let settings = [
        &*format!("eval_tasks = 4\nenvironment = \"{judged}\""),
        "steps = 2\ngroups_per_step = 3\ngroup_size = 4",
    ];
    let lines = run(dir.path(), settings[0], settings[1], &["--env", &judged]);
    let summary = lines.last().unwrap();
    let counts = &summary["trajectories"];
    assert_eq!(
        (&counts["consumed"], &counts["rejected"]),
        (&24.into(), &0.into()),
        "judged alike: {summary}"
    );
    learns_what_one_process_learns(dir.path(), settings, summary);
}

/// What `training-swarm` prints.
fn told(args: &[&str]) -> Vec<Value> {
    let mut program = Program::start(env!("CARGO_BIN_EXE_training-swarm"), args);
    let lines: Vec<Value> = std::iter::from_fn(|| program.next()).collect();
    assert!(program.process.succeeds(), "{lines:?}");
    lines
}

/// What it prints last.
fn report(args: &[&str]) -> Value {
    told(args).pop().expect("a report")
}

#[test]
fn games_are_learnt_and_measured_by_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let shape = "hidden = 32\nffn = 64\nlayers = 1\nheads = 1\nkv_heads = 1\nmax_context = 256\nbatch = 32";
    let pretrain = format!("steps = 60\n{shape}\nenvironment = \"kuhn\"\n[optim]\nlearning_rate = 1e-2\n");
    std::fs::write(path("pretrain.toml"), pretrain).unwrap();
    let made = report(&["pretrain", "--config", &path("pretrain.toml"), "--out", &path("model"), "--json"]);
    assert!(made["held_out_reward"].as_f64().unwrap() > 0.35, "it has learnt the words: {made}");
    let gives = |adapter: &[&str]| {
        let (model, args) = (path("model"), ["exploitability", "--env", "kuhn", "--json", "--model"]);
        report(&[&args[..], &[&model], adapter].concat())
    };
    let before = gives(&[]);
    let exploitability = |report: &Value| report["exploitability"].as_f64().unwrap();
    assert!(exploitability(&before) > 0.2, "it plays about at random: {before}");

    let settings = "[run]\nenvironment = \"kuhn:best\"\neval_tasks = 20\n[run.trainer]\nsteps = 3\ngroups_per_step = 4\n\
                    group_size = 4\nmax_completion_tokens = 64\n";
    std::fs::write(path("run.toml"), settings).unwrap();
    let args =
        ["solo", "--config", &path("run.toml"), "--model", &path("model"), "--out", &path("out"), "--json"];
    let trained = report(&args);
    assert_eq!(trained["steps"], 3);
    assert!((trained["exploitability_before"].as_f64().unwrap() - exploitability(&before)).abs() < 1e-4);
    let after = gives(&["--adapter", &path("out/adapter.safetensors")]);
    assert!((trained["exploitability_after"].as_f64().unwrap() - exploitability(&after)).abs() < 1e-4);
    assert!(Path::new(trained["plots"][1].as_str().unwrap()).is_file());

    // Against its own past, the same words at another table.
    let args = [
        "solo",
        "--config",
        &path("run.toml"),
        "--model",
        &path("model"),
        "--out",
        &path("past"),
        "--json",
        "--env",
        "kuhn:self",
    ];
    assert_eq!(report(&args)["rewards"].as_array().unwrap().len(), 3);

    let losses = "model = \"tiny\"\n[[losses]]\nname = \"as new\"\n[losses.loss]\nsurrogate = { kind = \"reinforce\" }\n\
                  normaliser = { kind = \"token_mean\" }\n[run]\neval_tasks = 4\n[run.trainer]\nsteps = 4\n\
                  groups_per_step = 2\ngroup_size = 4\n";
    std::fs::write(path("staleness.toml"), losses).unwrap();
    let curves = report(&[
        "staleness",
        "--config",
        &path("staleness.toml"),
        "--staleness",
        "0,2",
        "--out",
        &path("curves"),
        "--json",
    ]);
    let oldest: Vec<&Value> =
        curves["runs"].as_array().unwrap().iter().map(|r| &r["staleness_max"]).collect();
    assert_eq!(oldest, [0, 2], "rollouts are as old as asked for");
    assert!(Path::new(curves["plots"][0].as_str().unwrap()).is_file());
}

/// Rollouts that run ahead are counted once and never too old, whatever becomes of those that a new policy finds unfinished.
fn asynchronous(steps: u64, options: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let trainer = format!("steps = {steps}\ngroups_per_step = 16\ngroup_size = 8\nmax_staleness = 2");
    let lines = run(dir.path(), "mode = \"async\"\neval_tasks = 50", &trainer, options);
    let summary = lines.last().unwrap();
    assert_eq!((&summary["versions"], &summary["staleness"]["budget"]), (&steps.into(), &2.into()));
    assert_eq!(summary["trajectories"]["consumed"], steps * 16 * 8, "{summary}");
    for nothing in ["lost", "duplicated", "rejected"] {
        assert_eq!(summary["trajectories"][nothing], 0, "{summary}");
    }
    let oldest = summary["staleness"]["max"].as_u64().unwrap();
    assert!((1..=2).contains(&oldest), "rollouts run ahead of the learner within the budget: {summary}");
    lines.into_iter().filter(|l| l["event"] == "step").collect()
}

#[test]
fn the_asynchronous_mode_learns_within_its_staleness_budget() {
    let steps = asynchronous(24, &[]);
    assert!(steps.iter().all(|s| s["staleness_max"].as_u64().unwrap() <= 2), "{steps:?}");
    let reward =
        |part: &[Value]| part.iter().map(|s| s["reward"].as_f64().unwrap()).sum::<f64>() / part.len() as f64;
    let (first, last) = (reward(&steps[..4]), reward(&steps[20..]));
    assert!(last > first + 0.1, "mean reward {first} of the first steps, {last} of the last");
}

#[test]
fn samples_that_a_new_policy_finds_unfinished_switch_to_it_or_are_broken_off() {
    for in_flight in ["switch", "abort"] {
        assert_eq!(asynchronous(6, &["--in-flight", in_flight]).len(), 6);
    }
}
