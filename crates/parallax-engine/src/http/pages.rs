//! The pages for people: one file each, without outside resources, under a policy that runs no script but their own.

use std::sync::LazyLock;

use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Server;

const CHAT: &str = include_str!("../../assets/chat.html");
const CLUSTER: &str = include_str!("../../assets/cluster.html");

/// The pages with the policy of each, which is computed once.
static PAGES: LazyLock<[(String, &str); 2]> =
    LazyLock::new(|| [CHAT, CLUSTER].map(|text| (policy(text), text)));

/// The chat page.
pub(super) fn chat() -> Response {
    page(&PAGES[0])
}

/// The cluster page.
pub(super) fn cluster() -> Response {
    page(&PAGES[1])
}

/// A policy that allows exactly a page's own script and style, by their hashes, and talking to this server.
fn policy(text: &str) -> String {
    let script = hash(text, "<script>", "</script>");
    let style = hash(text, "<style>", "</style>");
    format!(
        "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    )
}

fn page((policy, text): &'static (String, &'static str)) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    (headers, *text).into_response()
}

/// `sha256-..` of the only element between two tags, as content security policies name it.
fn hash(text: &str, open: &str, close: &str) -> String {
    use base64::Engine as _;
    use sha2::Digest as _;
    let inside =
        text.split_once(open).and_then(|(_, rest)| rest.split_once(close)).map_or("", |(inside, _)| inside);
    let digest = sha2::Sha256::digest(inside.as_bytes());
    format!("sha256-{}", base64::engine::general_purpose::STANDARD.encode(digest))
}

/// What the cluster page shows: what this engine does, and who computes if that is not this machine alone.
pub(super) fn cluster_status(server: &Server) -> Value {
    let (engine, shape) = (server.state.engine.metrics(), server.state.engine.shape());
    let ready = server.gate.check_open().and_then(|()| server.check_ready()).is_ok();
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
    (n > 0).then(|| histogram.sum() / n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_bring_everything_with_them_and_the_policy_names_it() {
        for one in &*PAGES {
            let text = one.1;
            assert_eq!((text.matches("<script").count(), text.matches("<style").count()), (1, 1));
            for outside in
                ["http://", "https://", "src=", "@import", "url(", " style=\"", "innerHTML", "onclick="]
            {
                assert!(!text.contains(outside), "a page holds {outside}");
            }
            let response = page(one);
            let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
            for kind in ["script-src", "style-src"] {
                let allowed = policy.split(';').find_map(|d| d.trim().strip_prefix(kind)).unwrap();
                assert!(allowed.split_whitespace().all(|source| source.starts_with("'sha256-")), "{policy}");
            }
        }
    }
}
