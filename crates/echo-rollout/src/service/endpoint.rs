//! An opponent behind an OpenAI-compatible API: any chat model, on this machine or elsewhere, plays the other seat.
//!
//! It is shown what the policy would be shown in its place, as user messages, with its own words between. An answer that is
//! late, too long or no answer costs the hand, not the worker, and is never a reward.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::post::{HttpError, Post};
use crate::environment::cards::{Said, Speaker};

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
    /// It cannot be asked, is late, or refused.
    #[error(transparent)]
    Http(#[from] HttpError),
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
    post: Post,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({:?})", self.config)
    }
}

impl Endpoint {
    /// An endpoint that has not been asked yet; nothing is sent.
    ///
    /// # Errors
    /// An address that is none.
    pub fn new(config: EndpointConfig) -> Result<Self, EndpointError> {
        let post = Post::new(&format!("{}/chat/completions", config.url), config.time_limit)?;
        Ok(Self { config, post })
    }

    /// Asks and waits.
    fn ask(&self, question: &Value) -> Result<String, EndpointError> {
        let body = self.post.ask(question, self.config.api_key.as_deref())?;
        let wrong = |reason: String| EndpointError::Answer {
            url: self.config.url.clone(),
            answer: String::from_utf8_lossy(&body).chars().take(80).collect(),
            reason,
        };
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
    use std::sync::Arc;

    use super::*;
    use crate::environment::{Guests, RewardError, Turn, by_name_with};
    use crate::service::post::tests::{http, server};

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
