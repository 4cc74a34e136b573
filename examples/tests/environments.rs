//! Environments in Python over HTTP: `serve.py` answers for every module beside it, and says so when what comes is no question.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![expect(clippy::print_stderr, reason = "who runs the tests hears what is skipped")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::{Value, json};

/// Longer than any answer takes.
const PATIENT: Duration = Duration::from_secs(60);

/// A server, which does not outlive the test.
struct Server {
    process: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    /// `serve.py` with this module, under a terminal in which nobody types; `None` without Python.
    fn start(module: &str) -> Option<Self> {
        if !Command::new("python3").arg("--version").status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: needs python3");
            return None;
        }
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/environments/serve.py");
        let mut command = Command::new("python3");
        command.args([program, module]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut server = Self { process: command.spawn().unwrap(), address: String::new() };
        let mut lines = BufReader::new(server.process.stdout.take().unwrap()).lines();
        let (send, first) = channel();
        std::thread::spawn(move || send.send(lines.next()));
        let line = first.recv_timeout(PATIENT).expect("a server says where it is").unwrap().unwrap();
        let url = serde_json::from_str::<Value>(&line).unwrap()["url"].as_str().unwrap().to_owned();
        server.address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        Some(server)
    }

    /// The reply to a POST of `body` that says it has `length` bytes: its status and its body.
    fn post(&self, length: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENT)).unwrap();
        let head =
            format!("POST / HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").expect("a reply");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn ask(&self, question: &Value) -> (u16, String) {
        let question = question.to_string();
        self.post(&question.len().to_string(), &question)
    }
}

#[test]
fn every_environment_is_served() {
    for module in ["guess", "sums"] {
        let Some(server) = Server::start(module) else { return };
        let (status, hello) = server.ask(&json!({ "id": 7, "op": "hello" }));
        let hello: Value = serde_json::from_str(&hello).unwrap();
        assert_eq!((status, &hello["id"], &hello["name"]), (200, &json!(7), &json!(module)));
        assert!(hello["at_once"].as_u64() > Some(1), "{hello}");
    }
}

#[test]
fn what_is_no_question_is_refused_and_the_next_one_answered() {
    let Some(server) = Server::start("sums") else { return };
    for (length, body, status, reason) in [
        ("-1", "", 413, "-1 bytes"),
        ("99999999", "", 413, "at most"),
        ("many", "", 400, "no question"),
        ("2", "[]", 400, "no question"),
        ("2", "{}", 400, "no question"),
        ("8", "{\"id\":1}", 500, "op"),
    ] {
        let (got, said) = server.post(length, body);
        assert!(got == status && said.contains(reason), "{length} {body}: {got} {said}");
    }
    let (status, task) = server.ask(&json!({ "id": 8, "op": "task", "seed": 3 }));
    assert!(status == 200 && task.contains("What is"), "{status} {task}");
}
