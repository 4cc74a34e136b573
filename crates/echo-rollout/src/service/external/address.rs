//! A server that is asked over HTTP: the question is the body of a POST to its address, the answer the body of the reply.
//!
//! Nothing is asked twice here: a question that failed costs a worker a lease, which is made again. Who plays for itself, as the
//! learner does when it measures, plays the episode again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Asked, ExternalError, numbered};
use crate::service::post::Post;

/// A server by its address.
pub(super) struct Address {
    post: Post,
    /// Questions so far.
    asked: AtomicU64,
}

impl Address {
    pub(super) fn new(url: &str, time_limit: Duration) -> Result<Self, ExternalError> {
        Ok(Self { post: Post::new(url, time_limit)?, asked: AtomicU64::new(0) })
    }
}

impl Asked for Address {
    fn who(&self) -> &str {
        self.post.url()
    }

    fn ask(&self, mut question: Value) -> Result<Value, ExternalError> {
        let id = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        question["id"] = json!(id);
        numbered(self.who(), &self.post.ask(&question, None)?, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::{Environment, Guests, RewardError, Task, Turn, by_name_with};
    use crate::service::External;
    use crate::service::post::tests::{http, server};

    const PATIENT: Duration = Duration::from_secs(60);

    fn ok(fields: &str) -> String {
        http("200 OK", &format!("{{{fields}}}"))
    }

    fn hello(limit: Duration, answers: &[String]) -> External {
        let hello = ok(r#""id":1,"name":"far","turns":2,"high":2.0,"at_once":1000"#);
        let (url, _) = server([&[hello][..], answers].concat());
        External::connect(&url, limit).unwrap()
    }

    #[test]
    fn a_server_makes_tasks_and_judges_turns() {
        let (url, asked) = server(vec![
            ok(r#""id":1,"name":"far","turns":2,"high":2.0,"at_once":4"#),
            ok(r#""id":2,"prompt":"Say yes.","answer":"yes""#),
            ok(r#""id":3,"observation":"Again.""#),
            ok(r#""id":4,"reward":1.5,"components":{"late":1}"#),
        ]);
        // By its address, as programs name it.
        let elsewhere = |address: &str| {
            let found = External::connect(address, PATIENT).map_err(|e| e.to_string())?;
            assert_eq!((found.concurrency(), found.turns(), found.reward_range()), (4, 2, 0.0..=2.0));
            Ok(Box::new(found) as Box<dyn Environment>)
        };
        let external = by_name_with(&url, &Guests { elsewhere: &elsewhere, ..Guests::none() }).unwrap();
        assert_eq!(external.name(), "far");
        let task = external.task(9).unwrap();
        assert_eq!((task.prompt.as_str(), task.answer.as_str(), task.seed), ("Say yes.", "yes", 9));
        let mut episode = external.episode(&task);
        assert_eq!(episode.step("no").unwrap(), Turn::Continue { observation: "Again.".to_owned() });
        assert!(matches!(episode.step("yes").unwrap(), Turn::Done(r) if r.value() == 1.5));
        let questions: Vec<String> = (0..4).map(|_| asked.recv().unwrap()).collect();
        assert!(questions[0].starts_with("POST /v1 ") && questions[0].contains(r#""op":"hello""#));
        assert!(questions[3].contains(r#""said":["no","yes"]"#), "{}", questions[3]);
    }

    #[test]
    fn hangs_crashes_refusals_and_nonsense_cost_a_question_each() {
        let endless = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(2 << 20));
        let external = hello(
            Duration::from_secs(2),
            &[
                http("500 Internal Server Error", "Traceback: no such file"),
                http("302 Found\r\nlocation: http://127.0.0.1:1/", ""),
                http("200 OK", "<html>"),
                ok(r#""id":4,"reward":1"#),
                ok(r#""id":6,"reward":"much""#),
                ok(r#""id":7"#),
                // Half of what it promises.
                "HTTP/1.1 200 OK\r\ncontent-length: 99\r\nconnection: close\r\n\r\n{\"id\"".to_owned(),
                endless,
                String::new(),
                ok(r#""id":11,"reward":0.5"#),
            ],
        );
        assert_eq!(external.concurrency(), 256, "whatever it says");
        let task = Task { seed: 1, prompt: "?".to_owned(), answer: String::new() };
        let say = || external.episode(&task).step("it");
        for reason in [
            "status 500: Traceback",
            "status 302",
            "\"<html>\"",
            "question 5 needs",
            "invalid type: string",
            "either a reward or an observation",
            "does not answer",
            "longer than 1048576 bytes",
            "took too long",
        ] {
            let error = say().unwrap_err();
            assert!(matches!(error, RewardError::Verifier { .. }), "{error}");
            assert!(error.to_string().contains(reason), "{reason}: {error}");
        }
        assert!(matches!(say().unwrap(), Turn::Done(r) if r.value() == 0.5), "and it is asked again");
    }

    #[test]
    fn an_address_that_is_none_or_that_nobody_answers_is_named() {
        let failed = |url: &str| External::connect(url, PATIENT).unwrap_err().to_string();
        assert!(failed("http://not a url").contains("no http address"));
        assert!(failed("ftp://127.0.0.1/").contains("no http address"));
        assert!(failed("http://127.0.0.1:9").contains("http://127.0.0.1:9"));
        let (url, _asked) = server(vec![ok(r#""id":1,"name":"far","low":1.0,"high":0.0"#)]);
        assert!(failed(&url).contains("finite range"));
    }
}
