//! The chat page in a real browser: a key, a question, token speed, stop, regenerate, edit, reload, folded reasoning,
//! markdown; and the cluster page of a swarm of three processes, row by row against its status. What the browser does is in
//! the script beside this file.
//!
//! Without Chromium's driver or `python3` it says so and passes. `CHROMEDRIVER` names another driver; with
//! `CHAT_PAGE_SHOTS` screenshots are left in that folder.

use serde_json::{Value, json};
use swarm_tests::script;
use swarm_tests::server::Server;
use swarm_tests::swarm::Swarm;

/// What the script saw; nothing without a browser.
fn seen() -> Option<Value> {
    let driver = std::env::var("CHROMEDRIVER").unwrap_or_else(|_| "chromedriver".into());
    if let Some(missing) =
        [driver.as_str(), "python3"].into_iter().find(|program| !script::runs(program, &["--version"]))
    {
        script::skipped(&format!(
            "the chat page was not tried in a browser; {missing} is not there (Debian: apt-get install chromium-driver \
             python3), or CHROMEDRIVER=PROGRAM"
        ));
        return None;
    }
    let server = Server::toy();
    let swarm = Swarm::start();
    let (middle, last) = (swarm.join("middle", 2, "2..3"), swarm.join("last", 3, "3..6"));
    swarm.wait_until_ready(&[&middle, &last]);
    let (cluster, shots) = (format!("http://{}", swarm.address), std::env::var("CHAT_PAGE_SHOTS").ok());
    let args = [driver.as_str(), &server.url, &cluster];
    Some(script::run("python3", "chat_page.py", args.into_iter().chain(shots.as_deref())))
}

#[test]
fn the_pages_work_in_a_browser() {
    let Some(seen) = seen() else { return };
    check_chat(&seen);
    check_cluster(&seen);
}

fn check_chat(seen: &Value) {
    assert_eq!(seen["answer"], json!(["length", 40, 40]));
    let speed = seen["speed"].as_str().unwrap_or_default();
    assert!(speed.starts_with("40 tokens · ") && speed.contains(" tok/s · first after "), "{speed}");
    assert_eq!(seen["regenerated_equal"], json!(true));
    // Nothing of the answer was there yet.
    assert_eq!(
        (&seen["stopped"][0], &seen["stopped"][1]),
        (&json!("stopped"), &json!(0)),
        "{}",
        seen["stopped"]
    );
    let midway = seen["stopped_midway"].as_array().expect("both ways to stop were tried");
    assert_eq!(midway.len(), 2);
    for stopped in midway {
        assert_eq!((&stopped["live"][0], &stopped["live"][2]), (&json!("Stop"), &json!(true)), "{stopped}");
        assert!(stopped["live"][1].as_str().is_some_and(|speed| speed.contains(" tok/s")), "{stopped}");
        let told = stopped["told"].as_str().unwrap_or_default();
        assert!(told.contains(" tok/s · ") && told.ends_with(" · stopped"), "{stopped}");
        assert_eq!(
            (&stopped["finish"], &stopped["button"]),
            (&json!("stopped"), &json!("Send")),
            "{stopped}"
        );
        assert_eq!((&stopped["kept"], &stopped["is_beginning"]), (&json!(true), &json!(true)), "{stopped}");
        let (length, whole) = (stopped["length"].as_u64(), stopped["whole"].as_u64());
        assert!(length >= Some(8) && length < whole && whole == Some(180), "{stopped}");
    }
    assert_eq!((&seen["edited"], &seen["listed"]), (&json!("hello there you"), &json!(["hello there"])));
    assert_eq!(seen["thoughts"], json!([40, "", "Thoughts"]));
    assert_eq!(seen["unfolded"], json!([true, true]));
    // No image and no link: neither HTML nor a script's address comes from a model's text.
    assert_eq!(seen["drawn"], json!([1, 1, 1, 1, 0, 0]));
    assert_eq!(seen["code"], json!("fn main() {}"));
    assert!(seen["refused"].as_str().is_some_and(|why| why.contains("API key")), "{}", seen["refused"]);
}

fn check_cluster(seen: &Value) {
    let alone = "this machine runs the whole model\nthis machine\nlayers 0–1";
    assert_eq!(seen["one_machine"], json!(["toy · Cluster", "one machine", alone, true]));
    assert_eq!(seen["title"], json!(["model · Cluster", "model", "model"]));
    let place = seen["where"][0].as_str().unwrap_or_default();
    assert!(place.starts_with("swarm “test”, 3 machines"), "{place}");
    assert_eq!((&seen["where"][1], &seen["where"][2]), (&json!("test"), &json!(3)));
    // Each machine's row and each stage's segment say what the status says, and they are the three that were started.
    assert_eq!(seen["rows"], seen["nodes"]);
    assert_eq!(seen["lanes"], seen["stages"]);
    let layers: Vec<&Value> =
        seen["stages"][0].as_array().into_iter().flatten().map(|stage| &stage[1]).collect();
    assert_eq!(layers, ["0–1", "2–2", "3–5"]);
    let heads = seen["rows"].as_array().into_iter().flatten().filter(|row| row[1] == "head, cpu").count();
    assert_eq!((heads, seen["rows"].as_array().map(Vec::len)), (1, Some(3)));
    for off in seen["widths"].as_array().into_iter().flatten() {
        assert!(off.as_f64() < Some(0.05), "a segment is as wide as its share of the layers: {off}");
    }
}
