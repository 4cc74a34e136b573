//! The routes over a tiny model and a sampler that only takes notes.

use std::path::Path as FilePath;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use parallax_model::{BaseDtype, Checkpoint};
use prost::Message as _;

use super::super::datum::tests::{datum, request};
use super::super::promises::Answer;
use super::super::sampler::{SampleError, SampleTask, SampledAnswer, SampledAnswers, TaskSampler};
use super::super::{Gateway as Service, GatewayConfig};
use super::*;
use crate::service::evaluation::BoxFuture;

/// Answers with token 1, and notes which adapters came and went.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Notes {
    fn note(&self, what: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl TaskSampler for Notes {
    fn add(&self, name: &str, adapter: Vec<u8>) -> BoxFuture<'_, Result<(), String>> {
        self.note(format!("+{name} {}", blake3::hash(&adapter).to_hex()));
        Box::pin(std::future::ready(Ok(())))
    }

    fn remove(&self, name: &str) {
        self.note(format!("-{name}"));
    }

    fn sample(&self, task: SampleTask) -> BoxFuture<'static, Result<SampledAnswers, SampleError>> {
        let answer = SampledAnswer { tokens: vec![1], logprobs: vec![-1.0], stopped: true, top: Vec::new() };
        let answers = vec![answer; task.samples];
        Box::pin(std::future::ready(Ok(SampledAnswers { answers, ..SampledAnswers::default() })))
    }
}

fn service(dir: &FilePath) -> (Arc<Inner>, Arc<Notes>) {
    service_over(dir, BaseDtype::F32)
}

/// With frozen weights in this format.
fn service_over(dir: &FilePath, base_dtype: BaseDtype) -> (Arc<Inner>, Arc<Notes>) {
    let notes = Arc::new(Notes::default());
    let config = GatewayConfig { base_dtype, concurrent_samples: 4, ..GatewayConfig::new("tiny") };
    let service = Service::open(config, Checkpoint::tiny().unwrap(), notes.clone(), dir).unwrap();
    (Arc::clone(&service.inner), notes)
}

fn body(value: &Value) -> Bytes {
    value.to_string().into()
}

/// Waits for what was promised.
async fn kept(inner: &Inner, accepted: Answered) -> Outcome {
    let name = accepted.unwrap().0["request_id"].as_str().unwrap().to_owned();
    let until = tokio::time::Instant::now() + Duration::from_secs(600);
    match inner.promises.get(&name, until).await {
        Answer::Ready(outcome) => outcome,
        other => panic!("{name}: {other:?}"),
    }
}

async fn done(inner: &Inner, accepted: Answered) -> Value {
    match kept(inner, accepted).await {
        Outcome::Json(value) => value,
        other => panic!("{other:?}"),
    }
}

/// A session and its first model.
async fn model(inner: &Arc<Inner>) -> (String, String) {
    let session = create_session(State(Arc::clone(inner))).await.unwrap().0;
    let session = session["session_id"].as_str().unwrap().to_owned();
    let asked = json!({"session_id": session, "model_seq_id": 0, "base_model": "tiny",
        "lora_config": {"rank": 2, "seed": 7}});
    let made = create_model(State(Arc::clone(inner)), body(&asked)).await;
    let model = done(inner, made).await["model_id"].as_str().unwrap().to_owned();
    (session, model)
}

async fn learn(inner: &Arc<Inner>, model: &str, seq: u64) {
    let mut message =
        request("cross_entropy", vec![datum("cross_entropy", &[1, 20, 30, 40], &[1.0, 1.0, 1.0], &[])]);
    (message.model_id, message.seq_id) = (model.to_owned(), seq as i32);
    let sent = message.encode_to_vec().into();
    let passed = forward_backward(State(Arc::clone(inner)), HeaderMap::new(), sent).await;
    assert!(matches!(kept(inner, passed).await, Outcome::Proto(_)));
    let step = json!({"model_id": model, "seq_id": seq + 1, "adam_params": {"learning_rate": 0.01}});
    let stepped = done(inner, optim_step(State(Arc::clone(inner)), body(&step)).await).await;
    assert!(stepped["metrics"]["grad_norm"].as_f64().unwrap() > 0.0, "{stepped}");
}

async fn save(inner: &Arc<Inner>, model: &str, seq: u64, more: &Value) -> Value {
    let mut asked = json!({"model_id": model, "seq_id": seq});
    for (key, value) in more.as_object().unwrap() {
        asked[key] = value.clone();
    }
    done(inner, save_for_sampler(State(Arc::clone(inner)), body(&asked)).await).await
}

async fn sample(inner: &Arc<Inner>, more: &Value) -> Outcome {
    let mut asked =
        json!({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "sampling_params": {}});
    for (key, value) in more.as_object().unwrap() {
        asked[key] = value.clone();
    }
    kept(inner, asample(State(Arc::clone(inner)), body(&asked)).await).await
}

#[tokio::test]
async fn what_is_saved_anew_is_sampled_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (inner, notes) = service(dir.path());
    let (_, model) = model(&inner).await;
    let mut hashes = Vec::new();
    for round in 0..2 {
        learn(&inner, &model, 1 + 3 * round).await;
        let path = save(&inner, &model, 3 + 3 * round, &json!({"path": "latest"})).await["path"].clone();
        for _ in 0..2 {
            assert!(matches!(sample(&inner, &json!({"model_path": path})).await, Outcome::Proto(_)));
        }
        let name = path.as_str().unwrap();
        let mut seen = notes.taken();
        if round > 0 {
            assert_eq!(seen.remove(0), format!("-{name}"), "the old one goes when the new one is saved");
        }
        let [added] = &seen[..] else { panic!("once is enough: {seen:?}") };
        hashes.push(added.strip_prefix(&format!("+{name} ")).unwrap().to_owned());
    }
    assert_ne!(hashes[0], hashes[1], "it has learnt meanwhile");
    let saved = "sampler_weights/latest".to_owned();
    let Json(_) = delete_checkpoint(State(Arc::clone(&inner)), Path((model, saved))).await.unwrap();
    assert_eq!(notes.taken().len(), 1, "and goes when it is deleted");
}

#[tokio::test]
async fn adapters_are_trained_over_frozen_weights_in_the_services_format_and_stay_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut adapters, mut saved) = (Vec::new(), Vec::<Value>::new());
    for format in [BaseDtype::F32, BaseDtype::Bf16, BaseDtype::Q8_0] {
        let (inner, notes) = service_over(dir.path(), format);
        let (_, model) = model(&inner).await;
        learn(&inner, &model, 1).await;
        let path = save(&inner, &model, 3, &json!({"path": "latest"})).await["path"].clone();
        assert!(matches!(sample(&inner, &json!({"model_path": path})).await, Outcome::Proto(_)));
        let seen = notes.taken();
        adapters.push(seen[0].rsplit_once(' ').unwrap().1.to_owned());
        let info =
            |path: &Value| weights_info(State(Arc::clone(&inner)), body(&json!({"tinker_path": path})));
        assert!(info(&path).await.is_ok());
        for other in &saved {
            let refused = info(other).await.unwrap_err();
            let wanted =
                format!("this server's is {}", format.model_id(&Checkpoint::tiny().unwrap().id().unwrap()));
            assert!(refused.detail.contains(&wanted), "{}", refused.detail);
        }
        saved.push(path);
    }
    assert_eq!(
        adapters[0], adapters[1],
        "the tiny model's weights are bf16: nothing is lost, nothing changes"
    );
    assert_ne!(adapters[0], adapters[2]);
}

#[tokio::test]
async fn a_session_takes_along_its_models_promises_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let (inner, _) = service(dir.path());
    let (session, model) = model(&inner).await;
    let saved = save(&inner, &model, 1, &json!({"sampling_session_seq_id": 0})).await;
    let sampler = saved["sampling_session_id"].as_str().unwrap();
    let asked = json!({"sampling_session_id": sampler, "seq_id": 1, "num_samples": 4});
    assert!(matches!(sample(&inner, &asked).await, Outcome::Proto(_)));
    let files = || std::fs::read_dir(dir.path().join(model.replace(':', "_")).join("sampler_weights"));
    assert_eq!(files().unwrap().count(), 1);
    let slot = inner.model(&model).unwrap();
    let Json(_) = finish_session(State(Arc::clone(&inner)), Path(session.clone())).await.unwrap();
    // A request that was being read when the session ended.
    let late = inner.submit(&slot, 2, Ok(Job::Step(OptimConfig::default()))).unwrap_err();
    assert_eq!(late.status, StatusCode::NOT_FOUND);
    let promise = format!("{model}:2");
    assert!(!matches!(inner.promises.get(&promise, tokio::time::Instant::now()).await, Answer::Pending));
    while files().is_ok_and(|files| files.count() > 0) {
        tokio::task::yield_now().await;
    }
    let again =
        json!({"session_id": session, "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}});
    let gone = create_model(State(Arc::clone(&inner)), body(&again)).await.unwrap_err();
    assert_eq!(gone.status, StatusCode::GONE);
}

#[tokio::test]
async fn a_sampling_request_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (inner, _) = service(dir.path());
    let long = vec![1; inner.checkpoint.config().max_context + 1];
    for (more, words) in [
        (json!({"num_samples": 5}), "1 to 4"),
        (json!({"prompt": {"chunks": [{"type": "encoded_text", "tokens": long}]}}), "the context holds"),
    ] {
        let mut asked = json!({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "sampling_params": {}, "base_model": "tiny"});
        for (key, value) in more.as_object().unwrap() {
            asked[key] = value.clone();
        }
        let refused = asample(State(Arc::clone(&inner)), body(&asked)).await.unwrap_err();
        assert!(refused.detail.contains(words), "{}", refused.detail);
    }
}

#[test]
fn keys_are_asked_for_when_there_are_any() {
    let keys = [blake3::hash(b"tml-secret")];
    let sent = |name: &'static str, value: &'static str| {
        let headers: HeaderMap = [(name, value)]
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .into_iter()
            .collect();
        check_key(&keys, &headers).map_err(|e| e.status)
    };
    assert!(sent("x-api-key", "tml-secret").is_ok() && sent("authorization", "Bearer tml-secret").is_ok());
    assert_eq!(sent("x-api-key", "tml-other"), Err(StatusCode::UNAUTHORIZED));
    assert!(check_key(&keys, &HeaderMap::new()).is_err() && check_key(&[], &HeaderMap::new()).is_ok());
}

#[test]
fn optimiser_settings_have_tinkers_defaults() {
    let step: OptimStep =
        serde_json::from_value(json!({"model_id": "m", "seq_id": 1, "adam_params": {"beta1": 0.5}})).unwrap();
    let adam = step.adam_params.unwrap();
    assert_eq!((adam.learning_rate, adam.beta1, adam.beta2, adam.eps), (1e-4, 0.5, 0.95, 1e-12));
    assert_eq!((adam.weight_decay, adam.grad_clip_norm), (0.0, 0.0));
}
