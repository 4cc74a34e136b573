//! Models from a stand-in for Hugging Face's hub, which breaks off, lies and asks for tokens.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(all(feature = "hub", feature = "http"))]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::{StreamExt as _, stream};
use parallax_engine::service::hub::{Hub, HubError};
use parallax_model::Checkpoint;
use serde_json::{Value, json};

const COMMIT: &str = "0123abcd";
const WEIGHTS: &str = "model.safetensors";

/// A hub that has the tiny model as `org/tiny`.
#[derive(Default)]
struct StandIn {
    /// Breaks an answer off behind so many bytes.
    breaks_after: Option<usize>,
    /// Sends the whole file, wherever it was asked to begin.
    ignores_ranges: bool,
    /// Changes one byte of the weights.
    lies: bool,
    /// Asks for this token.
    token: Option<&'static str>,
    /// The model is these files instead, which hold nothing but their names.
    gguf: &'static [&'static str],
    /// File and first byte of every answer.
    sent: Mutex<Vec<(String, usize)>>,
}

fn file(name: &str) -> Option<Vec<u8>> {
    let path = format!("{}/../../assets/tiny/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(path).ok()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl StandIn {
    fn content(&self, name: &str) -> Option<Vec<u8>> {
        if self.gguf.contains(&name) { Some(name.as_bytes().to_vec()) } else { file(name) }
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let sent = headers.get("authorization").and_then(|v| v.to_str().ok());
        self.token.is_none_or(|token| sent == Some(&format!("Bearer {token}")))
    }
}

async fn listing(
    State(hub): State<Arc<StandIn>>,
    Path((org, name, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    if !hub.admits(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if (org.as_str(), name.as_str()) != ("org", "tiny")
        || !["main", "v1", "refs/pr/7"].contains(&revision.as_str())
    {
        return StatusCode::NOT_FOUND.into_response();
    }
    let tiny = [
        "README.md",
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let names: &[&str] = if hub.gguf.is_empty() { &tiny } else { hub.gguf };
    let siblings = names.iter().map(|name| {
        let bytes = hub.content(name).unwrap();
        let lfs = (*name == WEIGHTS || name.ends_with(".gguf"))
            .then(|| json!({"sha256": sha256(&bytes), "size": bytes.len(), "pointerSize": 9}));
        json!({"rfilename": name, "size": bytes.len(), "blobId": format!("b{}", bytes.len()), "lfs": lfs})
    });
    let siblings: Vec<Value> = siblings.collect();
    Json(json!({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})).into_response()
}

async fn resolve(
    State(hub): State<Arc<StandIn>>,
    Path((_, _, commit, name)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    assert_eq!(commit, COMMIT);
    if !hub.admits(&headers) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let Some(mut bytes) = hub.content(&name) else { return StatusCode::NOT_FOUND.into_response() };
    if hub.lies && name == WEIGHTS {
        bytes[1_000_000] ^= 1;
    }
    let asked = headers.get("range").and_then(|v| v.to_str().ok());
    let from = asked.and_then(|v| v.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let from: usize = if hub.ignores_ranges { 0 } else { from };
    hub.sent.lock().unwrap().push((name, from));
    let rest = Bytes::from(bytes[from..].to_vec());
    let pieces = match hub.breaks_after.filter(|n| rest.len() > *n) {
        Some(n) => vec![Ok(rest.slice(..n)), Err(std::io::Error::other("the cable was pulled"))],
        None => vec![Ok(rest)],
    };
    let status = if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
    // The connection gets its turns to send what comes before a break.
    let pieces = stream::iter(pieces).then(|piece| async {
        for _ in 0..if piece.is_err() { 100 } else { 0 } {
            tokio::task::yield_now().await;
        }
        piece
    });
    (status, [("content-range", range)], Body::from_stream(pieces)).into_response()
}

struct Fetched {
    result: Result<PathBuf, HubError>,
    stand_in: Arc<StandIn>,
    cache: tempfile::TempDir,
    endpoint: String,
    last_progress: (u64, u64),
}

impl Fetched {
    fn sent(&self, name: &str) -> Vec<usize> {
        let sent = self.stand_in.sent.lock().unwrap();
        sent.iter().filter(|(sent, _)| sent == name).map(|(_, from)| *from).collect()
    }

    fn error(&self) -> String {
        self.result.as_ref().unwrap_err().to_string()
    }
}

async fn fetch(stand_in: StandIn, name: &str, token: Option<&str>) -> Fetched {
    let stand_in = Arc::new(stand_in);
    let routes = Router::new()
        .route("/api/models/{org}/{name}/revision/{revision}", get(listing))
        .route("/{org}/{name}/resolve/{commit}/{*file}", get(resolve))
        .with_state(Arc::clone(&stand_in));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(&endpoint, token.map(str::to_owned), cache.path().to_owned()).unwrap();
    let mut last_progress = (0, 0);
    let result = hub.fetch(&name.parse().unwrap(), |p| last_progress = (p.done_bytes, p.total_bytes)).await;
    Fetched { result, stand_in, cache, endpoint, last_progress }
}

#[tokio::test]
async fn a_model_arrives_whole_and_is_not_fetched_again() {
    let fetched = fetch(StandIn::default(), "org/tiny", None).await;
    let path = fetched.result.as_ref().unwrap();
    assert_eq!(Checkpoint::open(path).unwrap().id().unwrap(), Checkpoint::tiny().unwrap().id().unwrap());
    assert!(!path.join("README.md").exists(), "what does not run is left there");
    let total: usize =
        fetched.stand_in.sent.lock().unwrap().iter().map(|(name, _)| file(name).unwrap().len()).sum();
    assert_eq!(fetched.last_progress, (total as u64, total as u64));
    // Offline it is found by its name.
    let name: parallax_model::hub::HubName = "org/tiny".parse().unwrap();
    assert_eq!(name.cached(fetched.cache.path()).as_ref(), Some(path));
    let hub = Hub::new(&fetched.endpoint, None, fetched.cache.path().to_owned()).unwrap();
    let before = fetched.stand_in.sent.lock().unwrap().len();
    assert_eq!(&hub.fetch(&"org/tiny@v1".parse().unwrap(), |_| ()).await.unwrap(), path);
    assert_eq!(fetched.stand_in.sent.lock().unwrap().len(), before, "the same files under another name");
}

#[tokio::test]
async fn all_parts_of_a_model_arrive_and_a_missing_one_is_named() {
    let parts = &["Q4/m-00002-of-00002.gguf", "Q4/m-00001-of-00002.gguf", "Q8/m-00001-of-00002.gguf"];
    let named = "org/tiny/Q4/m-00002-of-00002.gguf";
    let fetched = fetch(StandIn { gguf: parts, ..StandIn::default() }, named, None).await;
    let path = fetched.result.as_ref().unwrap();
    assert!(path.ends_with("Q4/m-00001-of-00002.gguf"), "{}", path.display());
    for part in &parts[..2] {
        let here = path.with_file_name(part.strip_prefix("Q4/").unwrap());
        assert_eq!(std::fs::read(here).unwrap(), part.as_bytes());
    }
    let name: parallax_model::hub::HubName = named.parse().unwrap();
    assert!(name.cached(fetched.cache.path()).is_some());
    let lacking = "org/tiny/Q8/m-00001-of-00002.gguf";
    let fetched = fetch(StandIn { gguf: parts, ..StandIn::default() }, lacking, None).await;
    assert!(fetched.error().contains("Q8/m-00002-of-00002.gguf"), "{}", fetched.error());
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke_off() {
    let n = 300_000;
    let fetched = fetch(StandIn { breaks_after: Some(n), ..StandIn::default() }, "org/tiny", None).await;
    Checkpoint::open(fetched.result.as_ref().unwrap()).unwrap();
    let starts = fetched.sent(WEIGHTS);
    assert!(starts.len() >= 5 && starts.is_sorted() && starts[1] > 0, "{starts:?}");
    // Nothing comes twice, but for what was on its way when the connection broke.
    assert!(starts.windows(2).all(|pair| pair[1] <= pair[0] + n && pair[1] > pair[0]), "{starts:?}");
}

#[tokio::test]
async fn a_server_without_ranges_sends_it_from_the_beginning() {
    let cache = tempfile::tempdir().unwrap();
    let fetched = fetch(StandIn { ignores_ranges: true, ..StandIn::default() }, "org/tiny", None).await;
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let digest = sha256(&file(WEIGHTS).unwrap());
    std::fs::write(blobs.join(format!("{digest}.incomplete")), [9; 1000]).unwrap();
    let hub = Hub::new(&fetched.endpoint, None, cache.path().to_owned()).unwrap();
    let path = hub.fetch(&"org/tiny".parse().unwrap(), |_| ()).await.unwrap();
    assert_eq!(std::fs::read(path.join(WEIGHTS)).unwrap(), file(WEIGHTS).unwrap());
}

#[tokio::test]
async fn damaged_files_are_thrown_away() {
    let fetched = fetch(StandIn { lies: true, ..StandIn::default() }, "org/tiny", None).await;
    assert!(fetched.error().contains("model.safetensors arrived damaged"), "{}", fetched.error());
    let blobs = std::fs::read_dir(fetched.cache.path().join("models--org--tiny/blobs")).unwrap();
    assert_eq!(blobs.count(), 0, "nothing of it is left");
    let name: parallax_model::hub::HubName = "org/tiny".parse().unwrap();
    assert_eq!(name.cached(fetched.cache.path()), None);
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let closed = || StandIn { token: Some("t0ken"), ..StandIn::default() };
    let fetched = fetch(closed(), "org/tiny", None).await;
    assert!(fetched.error().contains("HF_TOKEN"), "{}", fetched.error());
    fetch(closed(), "org/tiny", Some("t0ken")).await.result.unwrap();
    fetch(StandIn::default(), "org/tiny@refs/pr/7", None).await.result.unwrap();
    for name in ["org/other", "org/tiny@v9"] {
        let fetched = fetch(StandIn::default(), name, None).await;
        assert!(matches!(fetched.result, Err(HubError::Missing { .. })), "{}", fetched.error());
    }
    // Where somebody listened a moment ago.
    let left = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let nobody = Hub::new(&format!("http://{left}"), None, std::env::temp_dir()).unwrap();
    let error = nobody.fetch(&"org/tiny".parse().unwrap(), |_| ()).await.unwrap_err().to_string();
    assert!(error.contains("HF_ENDPOINT"), "{error}");
}
