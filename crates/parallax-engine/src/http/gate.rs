//! Who may come in: keys, requests per minute, requests at the same time, pages from elsewhere; and who was sent away.
//!
//! Keys are compared by their hashes, in constant time. Every key has a rate of its own; without keys all clients share one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::error::ApiError;

/// Largest request body by default: a long context as JSON.
pub const DEFAULT_BODY_LIMIT_BYTES: usize = 8 * 1024 * 1024;

/// Headers of answers that pages from elsewhere may read.
const SHOWN_HEADERS: [&str; 3] = ["x-request-id", "request-id", "retry-after"];

/// Statuses of refusals that are counted one by one.
const COUNTED: [u16; 10] = [400, 401, 404, 405, 408, 413, 415, 429, 500, 503];

/// Limits of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLimits {
    /// Keys that clients may send; empty lets everyone in.
    pub api_keys: Vec<String>,
    /// Largest request body in bytes.
    pub body_bytes: usize,
    /// Requests that are read or answered at the same time; one more gets 429. 0 counts as 1.
    pub concurrent_requests: usize,
    /// Requests that one key may begin in a minute; a full minute's worth may come at once. `None`: as many as they like.
    pub requests_per_minute: Option<u32>,
    /// Clients may put their requests before those of others (a negative `priority`); behind them they always may.
    pub urgent_requests: bool,
    /// How long a client may take to send the head of a request, and then its body; the first head counts from the
    /// connection on, later ones from their first byte. One whose beginning comes together with the request before it is
    /// waited for as long as an idle connection.
    pub read_time: Duration,
    /// How long a connection stays open between two requests.
    pub idle_time: Duration,
    /// How long an answer waits for its client to take more of it; then the connection is closed and the answer ends.
    pub write_time: Duration,
    /// Origins whose pages may use this server in a browser; `*` is all of them, none leaves it to its own pages.
    pub allow_origins: Vec<HeaderValue>,
}

impl HttpLimits {
    /// What browsers are told about pages from elsewhere; nothing when none may come.
    pub(super) fn cors(&self) -> Option<CorsLayer> {
        let origins = &self.allow_origins;
        if origins.is_empty() {
            return None;
        }
        let all = origins.iter().any(|origin| origin == "*");
        let origin = if all { AllowOrigin::any() } else { AllowOrigin::list(origins.iter().cloned()) };
        let cors = CorsLayer::new().allow_origin(origin).allow_methods([Method::GET, Method::POST]);
        // Clients add headers of their own, which nothing here reads.
        let cors = cors.allow_headers(AllowHeaders::mirror_request());
        Some(cors.expose_headers(SHOWN_HEADERS.map(HeaderName::from_static)))
    }
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            body_bytes: DEFAULT_BODY_LIMIT_BYTES,
            concurrent_requests: 1024,
            requests_per_minute: None,
            urgent_requests: false,
            read_time: Duration::from_secs(30),
            idle_time: Duration::from_secs(75),
            write_time: Duration::from_secs(60),
            allow_origins: Vec::new(),
        }
    }
}

/// A bucket that fills with time and empties with requests. Pure: time is an argument.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket {
    level: f64,
    /// Of the last change.
    at: Duration,
}

impl Bucket {
    /// Takes one request; else how long until there is one.
    fn take(&mut self, now: Duration, per_minute: u32) -> Result<(), Duration> {
        let per_second = f64::from(per_minute) / 60.0;
        let elapsed = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + elapsed * per_second).min(f64::from(per_minute));
        self.at = now;
        if self.level >= 1.0 {
            self.level -= 1.0;
            return Ok(());
        }
        if per_second <= 0.0 {
            return Err(Duration::from_secs(60));
        }
        Err(Duration::from_secs_f64((1.0 - self.level) / per_second))
    }
}

/// Requests that were answered with an error, by status. One that fails in the middle of a stream is none of them.
#[derive(Debug, Default)]
pub(super) struct Refusals([AtomicU64; COUNTED.len() + 1]);

impl Refusals {
    /// Counts an answer, if it is one.
    pub(super) fn count(&self, status: StatusCode) {
        if status.is_client_error() || status.is_server_error() {
            let place = COUNTED.iter().position(|counted| *counted == status.as_u16());
            self.0[place.unwrap_or(COUNTED.len())].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many there were of each status; at last, of all others.
    pub(super) fn counts(&self) -> impl Iterator<Item = (String, u64)> {
        let codes = COUNTED.into_iter().map(|code| code.to_string()).chain(["other".to_owned()]);
        codes.zip(self.0.iter().map(|n| n.load(Ordering::Relaxed)))
    }
}

/// The gate of one server.
#[derive(Debug)]
pub(super) struct Gate {
    keys: Vec<blake3::Hash>,
    /// One for each key, or one for all.
    buckets: Mutex<Vec<Bucket>>,
    per_minute: Option<u32>,
    seats: Arc<Semaphore>,
    concurrent_requests: u32,
    closed: AtomicBool,
    opened: Instant,
    pub(super) refusals: Refusals,
}

impl Gate {
    pub(super) fn new(limits: &HttpLimits) -> Self {
        let keys: Vec<_> = limits.api_keys.iter().map(|key| blake3::hash(key.as_bytes())).collect();
        let full = Bucket { level: f64::from(limits.requests_per_minute.unwrap_or(0)), at: Duration::ZERO };
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
        let concurrent_requests =
            u32::try_from(limits.concurrent_requests.clamp(1, most)).expect("it was cut to 32 bits");
        Self {
            buckets: Mutex::new(vec![full; keys.len().max(1)]),
            keys,
            per_minute: limits.requests_per_minute,
            seats: Arc::new(Semaphore::new(concurrent_requests as usize)),
            concurrent_requests,
            closed: AtomicBool::new(false),
            opened: Instant::now(),
            refusals: Refusals::default(),
        }
    }

    /// Which key came, if it may.
    ///
    /// # Errors
    /// 401 without a known key.
    pub(super) fn key(&self, headers: &HeaderMap) -> Result<usize, ApiError> {
        if self.keys.is_empty() {
            return Ok(0);
        }
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let bearer = text(header::AUTHORIZATION.as_str()).and_then(|v| v.strip_prefix("Bearer "));
        let sent = blake3::hash(bearer.or_else(|| text("x-api-key")).unwrap_or_default().trim().as_bytes());
        self.keys.iter().position(|key| *key == sent).ok_or_else(ApiError::unauthorized)
    }

    /// Counts a request of a key.
    ///
    /// # Errors
    /// 429 when it has used up its minute.
    pub(super) fn rate(&self, key: usize) -> Result<(), ApiError> {
        let Some(per_minute) = self.per_minute else { return Ok(()) };
        let now = self.opened.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets[key].take(now, per_minute).map_err(|wait| {
            ApiError::busy(format!("more than {per_minute} requests per minute: wait and try again"), wait)
        })
    }

    /// A seat for one request, to be held until its answer has ended.
    ///
    /// # Errors
    /// 503 when the gate is closed, 429 when all are taken.
    pub(super) fn seat(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.check_open()?;
        Arc::clone(&self.seats).try_acquire_owned().map_err(|_| {
            let n = self.concurrent_requests;
            ApiError::busy(
                format!("{n} requests are being answered, which is the limit: try again"),
                Duration::from_secs(1),
            )
        })
    }

    /// # Errors
    /// 503 when the gate is closed.
    pub(super) fn check_open(&self) -> Result<(), ApiError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(ApiError::unavailable("this server is being stopped: ask another one, or later"));
        }
        Ok(())
    }

    /// Lets nobody in any more and waits until everybody is out. Dropping the future leaves the gate closed.
    pub(super) async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // The semaphore is never closed: this ends with all seats.
        let _ = self.seats.acquire_many(self.concurrent_requests).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_minutes_worth_at_once_and_then_at_its_rate() {
        let mut bucket = Bucket { level: 3.0, at: Duration::ZERO };
        for _ in 0..3 {
            bucket.take(Duration::from_secs(1), 3).unwrap();
        }
        let wait = bucket.take(Duration::from_secs(1), 3).unwrap_err();
        assert!((wait.as_secs_f64() - 20.0).abs() < 1e-6, "{wait:?}");
        assert!(bucket.take(Duration::from_secs(20), 3).is_err());
        bucket.take(Duration::from_secs(22), 3).unwrap();
        assert!(bucket.take(Duration::from_secs(22), 3).is_err());
        // A long pause does not save up more than a minute's worth.
        for _ in 0..3 {
            bucket.take(Duration::from_secs(10_000), 3).unwrap();
        }
        assert!(bucket.take(Duration::from_secs(10_000), 3).is_err());
    }

    #[test]
    fn keys_are_known_by_either_header() {
        let keys = vec!["one".to_owned(), "two".to_owned()];
        let gate = Gate::new(&HttpLimits { api_keys: keys, ..HttpLimits::default() });
        let sent = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            gate.key(&headers).ok()
        };
        assert_eq!(sent("authorization", "Bearer two"), Some(1));
        assert_eq!(sent("x-api-key", "one"), Some(0));
        assert_eq!(sent("x-api-key", "three"), None);
        assert_eq!(sent("authorization", "two"), None);
        assert_eq!(gate.key(&HeaderMap::new()).ok(), None);
    }

    #[test]
    fn refusals_are_counted_by_status_with_one_place_for_the_rest() {
        let refusals = Refusals::default();
        for status in [200, 429, 404, 429, 418, 511, 302] {
            refusals.count(StatusCode::from_u16(status).unwrap());
        }
        let counts: Vec<_> = refusals.counts().filter(|(_, n)| *n > 0).collect();
        assert_eq!(counts, [("404".to_owned(), 1), ("429".to_owned(), 2), ("other".to_owned(), 2)]);
        assert_eq!(refusals.counts().count(), COUNTED.len() + 1);
    }

    #[test]
    fn seats_come_back() {
        let gate = Gate::new(&HttpLimits { concurrent_requests: 1, ..HttpLimits::default() });
        let seat = gate.seat().unwrap();
        assert_eq!(gate.seat().unwrap_err().status(), 429);
        drop(seat);
        assert!(gate.seat().is_ok());
    }

    #[tokio::test]
    async fn a_closed_gate_waits_for_those_inside() {
        let gate = Gate::new(&HttpLimits { concurrent_requests: 2, ..HttpLimits::default() });
        let seat = gate.seat().unwrap();
        let mut closing = Box::pin(gate.close());
        assert!(futures::poll!(&mut closing).is_pending());
        assert_eq!(
            (gate.seat().unwrap_err().status(), gate.check_open().is_err()),
            (503.try_into().unwrap(), true)
        );
        drop(seat);
        closing.await;
        assert_eq!(gate.seat().unwrap_err().status(), 503);
    }
}
