//! The engine thread behind its handle, over the toy model.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "service")]

#[path = "support/toy.rs"]
mod toy;

use parallax_engine::{
    Batch, EngineConfig, EngineHandle, Event, FinishReason, LogSoftmax, Request, RequestError, StageError,
    StageOutput, StageRunner, StageShape, Tensor,
};
use swarm_wire::PolicyVersion;
use toy::{ToyModel, sampled, toy_greedy};

fn start(model: ToyModel) -> EngineHandle {
    EngineHandle::start(Box::new(model), EngineConfig::default()).unwrap()
}

#[test]
fn many_threads_share_a_handle_and_get_what_they_get_alone() {
    let handle = start(ToyModel::new(64, 4));
    let expected: Vec<_> = (0..8u32)
        .map(|i| start(ToyModel::new(64, 4)).generate_blocking(sampled(vec![i; 9], 12, 1)).unwrap())
        .collect();
    std::thread::scope(|scope| {
        for (i, expected) in (0..8u32).zip(&expected) {
            let handle = handle.clone();
            scope.spawn(move || {
                assert_eq!(&handle.generate_blocking(sampled(vec![i; 9], 12, 1)).unwrap(), expected)
            });
        }
    });
    let metrics = handle.metrics();
    assert_eq!(metrics.generated_tokens, 8 * 12);
    assert_eq!(metrics.latencies.time_to_first_token.count(), 8);
    assert_eq!(metrics.latencies.inter_token.count(), 8 * 11);
}

#[test]
fn a_dropped_stream_frees_its_place() {
    let config = EngineConfig { queued_requests: 1, ..EngineConfig::default() };
    let handle = EngineHandle::start(Box::new(ToyModel::new(1024, 4)), config).unwrap();
    let mut stream = handle.submit(Request::greedy(vec![1, 2], 4000)).unwrap();
    assert!(matches!(stream.next_blocking(), Some(Event::Token(_))));
    assert!(matches!(handle.submit(Request::greedy(vec![3], 1)), Err(RequestError::QueueFull { queued: 1 })));
    drop(stream);
    // The place is free after the next step at the latest; until then the refusal is QueueFull.
    let completion = loop {
        match handle.generate_blocking(Request::greedy(vec![3], 2)) {
            Err(RequestError::QueueFull { .. }) => std::thread::yield_now(),
            other => break other.unwrap(),
        }
    };
    assert_eq!(completion.token_ids(), toy_greedy(&[3], 2, 0));
    assert_eq!(handle.metrics().finished_aborted, 1);
}

#[test]
fn an_abort_ends_the_stream() {
    let handle = start(ToyModel::new(1024, 4));
    let mut stream = handle.submit(Request::greedy(vec![1, 2], 4000)).unwrap();
    handle.abort(stream.id());
    let mut last = None;
    while let Some(event) = stream.next_blocking() {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Finished { reason: FinishReason::Aborted, error: None }));
}

#[test]
fn a_swap_changes_the_tokens_and_their_version_and_a_bad_adapter_changes_nothing() {
    let handle = start(ToyModel::new(64, 4));
    let refused = handle.swap_adapter_blocking(PolicyVersion(1), Some(b"bad".to_vec())).unwrap_err();
    assert!(refused.to_string().contains("not an adapter"), "{refused}");
    assert_eq!(handle.version(), PolicyVersion(0));
    handle.swap_adapter_blocking(PolicyVersion(2), Some(b"good".to_vec())).unwrap();
    assert_eq!(handle.version(), PolicyVersion(2));
    let completion = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert!(completion.tokens.iter().all(|t| t.version == PolicyVersion(2)));
    let salt = b"good".iter().map(|b| u64::from(*b)).sum();
    assert_eq!(completion.token_ids(), toy_greedy(&[4, 5], 6, salt));
}

#[test]
fn a_failing_stage_ends_all_requests_with_its_text() {
    let mut model = ToyModel::new(64, 4);
    model.fail_at = Some(2);
    let handle = start(model);
    let completion = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert_eq!((completion.tokens.len(), completion.reason), (1, FinishReason::Error));
    assert!(completion.error.unwrap().contains("unplugged"));
    let again = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert_eq!(again.token_ids(), toy_greedy(&[4, 5], 6, 0));
}

/// A runner with a bug.
struct Panics(ToyModel);

impl StageRunner for Panics {
    fn shape(&self) -> StageShape {
        self.0.shape()
    }
    fn forward(&mut self, _: &Batch, _: Tensor) -> Result<StageOutput, StageError> {
        panic!("a bug in a runner");
    }
    fn set_adapter(&mut self, _: PolicyVersion, _: Option<&[u8]>) -> Result<(), StageError> {
        Ok(())
    }
    fn log_softmax(&self) -> LogSoftmax {
        self.0.log_softmax()
    }
}

#[test]
fn a_dead_engine_thread_is_an_error_not_a_hang() {
    let handle = EngineHandle::start(Box::new(Panics(ToyModel::new(8, 4))), EngineConfig::default()).unwrap();
    let completion = handle.generate_blocking(Request::greedy(vec![1], 1)).unwrap();
    assert_eq!(completion.reason, FinishReason::Error);
    // The channel closes when the thread has unwound; the place in the queue was never given back.
    let refused = loop {
        match handle.submit(Request::greedy(vec![1], 1)) {
            Err(error) => break error,
            Ok(mut stream) => assert!(matches!(stream.next_blocking(), Some(Event::Finished { .. }))),
        }
    };
    assert_eq!(refused, RequestError::Stopped);
}

#[tokio::test]
async fn streams_are_async_too() {
    let handle = start(ToyModel::new(64, 4));
    let mut stream = handle.submit(Request::greedy(vec![1, 2, 3], 4)).unwrap();
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Token(token) = event {
            ids.push(token.id);
        }
    }
    assert_eq!(ids, toy_greedy(&[1, 2, 3], 4, 0));
    assert_eq!(stream.next().await, None);
    let refused = handle.submit(Request::greedy(vec![], 4)).unwrap_err();
    assert_eq!(refused, RequestError::EmptyPrompt);
}
