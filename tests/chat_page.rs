//! The chat page in a real browser: a key, a question, stop, regenerate, edit, reload, folded reasoning, markdown. What the
//! browser does is in the script beside this file.
//!
//! Without Chromium's driver or `python3` it says so and passes. `CHROMEDRIVER` names another driver; with
//! `CHAT_PAGE_SHOTS` screenshots are left in that folder.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use swarm_tests::toy_server::ToyServer;

fn is_there(program: &str) -> bool {
    let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

#[test]
fn the_chat_page_works_in_a_browser() {
    let driver = std::env::var("CHROMEDRIVER").unwrap_or_else(|_| "chromedriver".into());
    if let Some(missing) = [driver.as_str(), "python3"].into_iter().find(|program| !is_there(program)) {
        let skipped = format!(
            "SKIPPED: the chat page was not tried in a browser; {missing} is not there (Debian: apt-get install \
             chromium-driver python3), or CHROMEDRIVER=PROGRAM\n"
        );
        // Past the test harness, which shows nothing of tests that pass.
        return std::io::stderr().write_all(skipped.as_bytes()).unwrap();
    }
    let server = ToyServer::new();
    let mut script = Command::new("python3");
    script.args([concat!(env!("CARGO_MANIFEST_DIR"), "/chat_page.py"), &driver, &server.url]);
    script.args(std::env::var_os("CHAT_PAGE_SHOTS")).env_remove("HTTP_PROXY").env_remove("http_proxy");
    let output = script.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "the browser's script failed; what it missed is above");
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(seen["answer"], json!(["length", 40, 40]));
    assert_eq!((&seen["speed"], &seen["regenerated_equal"]), (&json!(true), &json!(true)));
    assert_eq!(seen["stopped"][0], json!("stopped"), "{}", seen["stopped"]);
    assert_eq!((&seen["edited"], &seen["listed"]), (&json!("hello there you"), &json!(["hello there"])));
    // No image and no link: neither HTML nor a script's address comes from a model's text.
    assert_eq!(seen["drawn"], json!([1, 1, 1, 1, 1, 0, 0]));
    assert_eq!((&seen["code"], &seen["unfolded"]), (&json!("fn main() {}"), &json!(true)));
    assert!(seen["refused"].as_str().unwrap().contains("API key"), "{}", seen["refused"]);
    assert!(seen["cluster"].as_str().unwrap().contains("luster"), "{}", seen["cluster"]);
}
