//! A JSON question by HTTP and its answer: in time, of bounded length, or an error with the address in it.
//!
//! It is asked from threads that belong to no runtime, so each address has a runtime of its own.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use super::external::MAX_ANSWER_BYTES;

/// Beyond the time limit, which the client keeps itself: for the answer to come from its thread.
const GRACE: Duration = Duration::from_secs(1);

/// Why an address cannot be asked at all, or gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
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
        /// The address.
        url: String,
        /// Why not.
        source: std::io::Error,
    },
    /// It cannot be reached, is late, or says too much.
    #[error("{url} does not answer: {reason}")]
    Silent {
        /// The address.
        url: String,
        /// Why not.
        reason: String,
    },
    /// It refused.
    #[error("{url} answers with status {status}: {answer}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The first characters of the answer.
        answer: String,
    },
}

/// Asks one address.
pub(super) struct Post {
    target: Url,
    client: Client,
    time_limit: Duration,
    /// Always there but for the drop, which must not wait in a runtime's thread.
    runtime: Option<Runtime>,
}

impl Drop for Post {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Post {
    /// Asks at `url`; nothing is sent yet.
    pub(super) fn new(url: &str, time_limit: Duration) -> Result<Self, HttpError> {
        let wrong = |reason: String| HttpError::Url { url: url.to_owned(), reason };
        let target = Url::parse(url).map_err(|e| wrong(e.to_string()))?;
        if !matches!(target.scheme(), "http" | "https") {
            return Err(wrong(format!("{} is another protocol", target.scheme())));
        }
        // Who is asked is who was named.
        let client = Client::builder().timeout(time_limit).redirect(Policy::none()).build();
        let client = client.map_err(|e| wrong(e.to_string()))?;
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("post").enable_all().build();
        let runtime = runtime.map_err(|source| HttpError::Runtime { url: url.to_owned(), source })?;
        Ok(Self { target, client, time_limit, runtime: Some(runtime) })
    }

    /// The address.
    pub(super) fn url(&self) -> &str {
        self.target.as_str()
    }

    /// Asks and waits; the answer of at most [`MAX_ANSWER_BYTES`].
    pub(super) fn ask(&self, question: &Value, bearer: Option<&str>) -> Result<Vec<u8>, HttpError> {
        let url = || self.url().to_owned();
        let silent = |reason: String| HttpError::Silent { url: url(), reason };
        let Some(runtime) = &self.runtime else { return Err(silent("it is being dropped".to_owned())) };
        let mut request = self.client.post(self.target.clone()).json(question);
        if let Some(key) = bearer {
            request = request.bearer_auth(key);
        }
        let (send, answer) = sync_channel(1);
        runtime.spawn(async move { _ = send.send(fetch(request).await) });
        let received = answer.recv_timeout(self.time_limit + GRACE);
        let (status, body) = received
            .map_err(|e| match e {
                RecvTimeoutError::Timeout => silent(format!("nothing within {:?}", self.time_limit)),
                RecvTimeoutError::Disconnected => silent("its thread ended".to_owned()),
            })?
            .map_err(silent)?;
        if !(200..300).contains(&status) {
            let answer = String::from_utf8_lossy(&body).chars().take(80).collect();
            return Err(HttpError::Status { url: url(), status, answer });
        }
        Ok(body)
    }
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

#[cfg(test)]
pub(super) mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};

    /// A server that answers each connection with the next of `answers` (silence for an empty one) and hands on what was
    /// asked.
    pub(in crate::service) fn server(answers: Vec<String>) -> (String, Receiver<String>) {
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
                // Not everybody looks at what was asked.
                _ = send.send(text);
                if answer.is_empty() {
                    silent.push(stream);
                } else {
                    // Who has heard enough hangs up.
                    _ = stream.write_all(answer.as_bytes());
                }
            }
            // Connections that get no answer stay open until the test ends.
            silent.extend(listener.accept().map(|(stream, _)| stream));
        });
        (url, asked)
    }

    pub(in crate::service) fn http(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }
}
