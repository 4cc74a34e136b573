//! The pages for people: one file each, without outside resources, under a policy that runs no script but their own.

use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Server;

const CHAT: &str = include_str!("../../assets/chat.html");
const CLUSTER: &str = include_str!("../../assets/cluster.html");

/// The chat page.
pub(super) fn chat() -> Response {
    page(CHAT)
}

/// The cluster page.
pub(super) fn cluster() -> Response {
    page(CLUSTER)
}

/// A page with a policy that allows exactly its own script and style, by their hashes, and talking to this server.
fn page(text: &'static str) -> Response {
    let script = hash(text, "<script>", "</script>");
    let style = hash(text, "<style>", "</style>");
    let policy = format!(
        "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin".to_owned()),
    ];
    (headers, text).into_response()
}

/// `sha256-..` of the only element between two tags, as content security policies name it.
fn hash(text: &str, open: &str, close: &str) -> String {
    use sha2::Digest as _;
    let inside =
        text.split_once(open).and_then(|(_, rest)| rest.split_once(close)).map_or("", |(inside, _)| inside);
    format!("sha256-{}", base64(&sha2::Sha256::digest(inside.as_bytes())))
}

/// Base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4u32 {
            let digit = char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]);
            text.push(if i as usize <= chunk.len() { digit } else { '=' });
        }
    }
    text
}

/// What the cluster page shows: what this engine does, and who computes if that is not this machine alone.
pub(super) fn cluster_status(server: &Server) -> Value {
    let (engine, shape) = (server.state.engine.metrics(), server.state.engine.shape());
    let ready = server.check_ready().is_ok();
    json!({
        "model": server.state.model_name, "layers": shape.n_layers, "ready": ready,
        "engine": {
            "running": engine.running, "waiting": engine.waiting, "pages": engine.pages,
            "pages_used": engine.pages_used, "page_tokens": shape.page_tokens, "steps": engine.steps,
            "prompt_tokens": engine.prompt_tokens, "generated_tokens": engine.generated_tokens,
            "preemptions": engine.preemptions, "prefix_cache_queries": engine.prefix_cache_queries,
            "prefix_cache_hits": engine.prefix_cache_hits,
            "time_to_first_token_s": mean(&engine.latencies.time_to_first_token),
            "inter_token_s": mean(&engine.latencies.inter_token),
        },
        "swarm": server.state.cluster.as_ref().map(|source| source()),
    })
}

fn mean(histogram: &crate::metrics::Histogram) -> Option<f64> {
    let n = histogram.count();
    (n > 0).then(|| histogram.sum_seconds() / n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_rfc_4648s() {
        let pairs = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, coded) in pairs {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn pages_bring_everything_with_them_and_the_policy_names_it() {
        for text in [CHAT, CLUSTER] {
            assert_eq!((text.matches("<script").count(), text.matches("<style").count()), (1, 1));
            for outside in
                ["http://", "https://", "src=", "@import", "url(", " style=\"", "innerHTML", "onclick="]
            {
                assert!(!text.contains(outside), "a page holds {outside}");
            }
            let response = page(text);
            let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
            for kind in ["script-src", "style-src"] {
                let allowed = policy.split(';').find_map(|d| d.trim().strip_prefix(kind)).unwrap();
                assert!(allowed.split_whitespace().all(|source| source.starts_with("'sha256-")), "{policy}");
            }
        }
    }
}
