//! An opponent behind an OpenAI-compatible API: any chat model, on this machine or elsewhere, plays the other seat.
//!
//! It is shown what the policy would be shown in its place, as user messages, with its own words between. An answer that is
//! late, too long or no answer costs the hand, not the worker, and is never a reward. Each endpoint has a runtime of its own,
//! because episodes ask from threads that belong to none.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use crate::environment::cards::{Said, Speaker};

/// Most bytes of one answer.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Beyond the time limit, which the client keeps itself: for the answer to come from its thread.
const GRACE: Duration = Duration::from_secs(1);

/// Whom to ask, and how.
#[derive(Clone, PartialEq)]
pub struct EndpointConfig {
    /// Base of the API, up to and with `/v1`.
    pub url: String,
    /// The model to ask for. Default: `default`.
    pub model: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// How long one answer may take. Default: 20 s.
    pub time_limit: Duration,
    /// Most tokens of one answer. Default: 16.
    pub max_tokens: u32,
    /// 0 is greedy. Default: 1.
    pub temperature: f32,
}

impl EndpointConfig {
    /// The defaults for `address`: a URL, with the model's name after a `#` if there are several.
    pub fn new(address: &str) -> Self {
        let (url, model) = address.split_once('#').unwrap_or((address, "default"));
        Self {
            url: url.trim_end_matches('/').to_owned(),
            model: model.to_owned(),
            api_key: None,
            time_limit: Duration::from_secs(20),
            max_tokens: 16,
            temperature: 1.0,
        }
    }
}

impl fmt::Debug for EndpointConfig {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EndpointConfig({} at {})", self.model, self.url)
    }
}

/// Why an endpoint cannot be asked at all, or gave no usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// Not a URL.
    #[error("{url} is no http address: {reason}; it should look like http://127.0.0.1:3001/v1")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No thread to ask from.
    #[error("no thread to ask {url} from: {source}")]
    Runtime {
        /// The endpoint.
        url: String,
        /// Why not.
        source: std::io::Error,
    },
    /// It cannot be reached, or is late.
    #[error("{url} does not answer: {reason}")]
    Silent {
        /// The endpoint.
        url: String,
        /// Why not.
        reason: String,
    },
    /// It refused.
    #[error("{url} answers with status {status}: {answer}")]
    Status {
        /// The endpoint.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The first characters of the answer.
        answer: String,
    },
    /// It answered something else.
    #[error("{url} answered {answer:?}, which is no chat completion: {reason}")]
    Answer {
        /// The endpoint.
        url: String,
        /// The first characters of the answer.
        answer: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A chat model behind an API.
pub struct Endpoint {
    config: EndpointConfig,
    target: Url,
    client: Client,
    /// Always there but for the drop, which must not wait in a runtime's thread.
    runtime: Option<Runtime>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({:?})", self.config)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Endpoint {
    /// An endpoint that has not been asked yet; nothing is sent.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(config: EndpointConfig) -> Result<Self, EndpointError> {
        let wrong = |reason: String| EndpointError::Url { url: config.url.clone(), reason };
        let target =
            Url::parse(&format!("{}/chat/completions", config.url)).map_err(|e| wrong(e.to_string()))?;
        let client =
            Client::builder().timeout(config.time_limit).build().map_err(|e| wrong(e.to_string()))?;
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("endpoint").enable_all().build();
        let runtime = runtime.map_err(|source| EndpointError::Runtime { url: config.url.clone(), source })?;
        Ok(Self { config, target, client, runtime: Some(runtime) })
    }

    /// Asks and waits.
    fn ask(&self, question: &Value) -> Result<String, EndpointError> {
        let url = || self.config.url.clone();
        let silent = |reason: String| EndpointError::Silent { url: url(), reason };
        let Some(runtime) = &self.runtime else { return Err(silent("it is being dropped".to_owned())) };
        let mut request = self.client.post(self.target.clone()).json(question);
        if let Some(key) = &self.config.api_key {
            request = request.bearer_auth(key);
        }
        let (send, answer) = sync_channel(1);
        runtime.spawn(async move { _ = send.send(fetch(request).await) });
        let received = answer.recv_timeout(self.config.time_limit + GRACE);
        let (status, body) = received
            .map_err(|e| match e {
                RecvTimeoutError::Timeout => silent(format!("nothing within {:?}", self.config.time_limit)),
                RecvTimeoutError::Disconnected => silent("its thread ended".to_owned()),
            })?
            .map_err(silent)?;
        let beginning = || String::from_utf8_lossy(&body).chars().take(80).collect::<String>();
        if !(200..300).contains(&status) {
            return Err(EndpointError::Status { url: url(), status, answer: beginning() });
        }
        let wrong = |reason: String| EndpointError::Answer { url: url(), answer: beginning(), reason };
        let completion: Completion = serde_json::from_slice(&body).map_err(|e| wrong(e.to_string()))?;
        let choice = completion.choices.into_iter().next().ok_or_else(|| wrong("no choices".to_owned()))?;
        Ok(choice.message.content.unwrap_or_default())
    }
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
}

#[derive(Deserialize)]
struct Message {
    content: Option<String>,
}

/// The status and the body, of at most [`MAX_ANSWER_BYTES`].
async fn fetch(request: reqwest::RequestBuilder) -> Result<(u16, Vec<u8>), String> {
    let words = |e: reqwest::Error| match e.is_timeout() {
        true => "it took too long".to_owned(),
        false => e.to_string(),
    };
    let mut response = request.send().await.map_err(words)?;
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.map_err(words)? {
        if body.len() + part.len() > MAX_ANSWER_BYTES {
            return Err(format!("its answer is longer than {MAX_ANSWER_BYTES} bytes"));
        }
        body.extend_from_slice(&part);
    }
    Ok((response.status().as_u16(), body))
}

impl Speaker for Endpoint {
    fn say(&self, before: &[Said], shown: &str, seed: u64) -> Result<String, String> {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = before.iter().flat_map(|t| [message("user", &t.shown), message("assistant", &t.said)]);
        let messages: Vec<Value> = turns.chain([message("user", shown)]).collect();
        self.ask(&json!({
            "model": self.config.model, "messages": messages, "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
            // Seeds are signed in some servers.
            "seed": seed >> 2
        }))
        .map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::environment::{Guests, RewardError, Turn, by_name_with};

    /// A server that answers each connection with the next of `answers` (silence for an empty one) and hands on what was
    /// asked.
    fn server(answers: Vec<String>) -> (String, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let (send, asked) = channel();
        std::thread::spawn(move || {
            let mut silent = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut text, mut part) = (String::new(), [0; 4096]);
                let whole = |text: &str| {
                    let (head, body) = text.split_once("\r\n\r\n")?;
                    let length = head
                        .to_lowercase()
                        .split_once("content-length: ")?
                        .1
                        .split("\r\n")
                        .next()?
                        .parse()
                        .ok();
                    (body.len() >= length?).then_some(())
                };
                while whole(&text).is_none() {
                    let n = stream.read(&mut part).unwrap();
                    text.push_str(&String::from_utf8_lossy(&part[..n]));
                }
                send.send(text).unwrap();
                if answer.is_empty() {
                    silent.push(stream);
                } else {
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
            // Connections that get no answer stay open until the test ends.
            silent.extend(listener.accept().map(|(stream, _)| stream));
        });
        (url, asked)
    }

    fn http(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn says(words: &str) -> String {
        http(
            "200 OK",
            &json!({"choices": [{"message": {"role": "assistant", "content": words}}]}).to_string(),
        )
    }

    #[test]
    fn a_chat_model_plays_the_other_seat() {
        let (url, asked) = server(vec![says("I pass."), says("bet")]);
        let bring = |address: &str| -> Result<Arc<dyn Speaker>, String> {
            let config =
                EndpointConfig { api_key: Some("secret".to_owned()), ..EndpointConfig::new(address) };
            assert!(!format!("{config:?}").contains("secret"));
            Endpoint::new(config).map(|e| Arc::new(e) as Arc<dyn Speaker>).map_err(|e| e.to_string())
        };
        let guests = Guests { speaker: &bring, ..Guests::none() };
        let kuhn = by_name_with(&format!("kuhn:{url}#large"), &guests).unwrap();
        let task = kuhn.task(1).unwrap();
        assert!(task.prompt.contains("So far p."), "{}", task.prompt);
        let mut hand = kuhn.episode(&task);
        let Turn::Done(reward) = hand.step("bet").unwrap() else { panic!("it answers a bet, which ends it") };
        assert_eq!(reward.value().abs(), 2.0);
        let first = asked.recv().unwrap();
        assert!(first.starts_with("POST /v1/chat/completions"), "{first}");
        assert!(first.contains("\"model\":\"large\"") && first.contains("Bearer secret"), "{first}");
        let second = asked.recv().unwrap();
        let body: Value = serde_json::from_str(second.split_once("\r\n\r\n").unwrap().1).unwrap();
        let roles: Vec<&str> =
            body["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        assert_eq!(body["messages"][1]["content"], "I pass.");
    }

    #[test]
    fn silence_refusals_and_nonsense_are_errors_and_no_rewards() {
        let (url, _asked) = server(vec![
            http("503 Busy", "later"),
            http("200 OK", "hello"),
            http("200 OK", r#"{"choices":[]}"#),
            String::new(),
        ]);
        let bring = |address: &str| -> Result<Arc<dyn Speaker>, String> {
            let config =
                EndpointConfig { time_limit: Duration::from_secs(2), ..EndpointConfig::new(address) };
            Endpoint::new(config).map(|e| Arc::new(e) as Arc<dyn Speaker>).map_err(|e| e.to_string())
        };
        let guests = Guests { speaker: &bring, ..Guests::none() };
        let kuhn = by_name_with(&format!("kuhn:{url}"), &guests).unwrap();
        for reason in ["status 503: later", "\"hello\"", "no choices", "took too long"] {
            let error = kuhn.task(1).unwrap_err();
            assert!(
                matches!(error, RewardError::Verifier { .. }) && error.to_string().contains(reason),
                "{error}"
            );
        }
        let nobody = by_name_with("kuhn:http://127.0.0.1:9/v1", &guests).unwrap().task(1).unwrap_err();
        assert!(nobody.to_string().contains("does not answer"), "{nobody}");
        assert!(
            by_name_with("kuhn:http://not a url/v1", &guests)
                .unwrap_err()
                .to_string()
                .contains("no http address")
        );
    }
}
