//! The engine thread behind its handle, over the toy model.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "service")]

#[path = "support/toy.rs"]
mod toy;

use parallax_engine::{
    AdapterFile, Batch, Completion, EngineConfig, EngineHandle, Event, FinishReason, LogSoftmax, OnSwap,
    Recovery, Request, RequestError, StageError, StageOutput, StageRunner, StageShape, Tensor, TokenStream,
};
use swarm_wire::PolicyVersion;
use toy::{ToyModel, sampled, toy_greedy};

fn start(model: ToyModel) -> EngineHandle {
    EngineHandle::start(Box::new(model), EngineConfig::default()).unwrap()
}

/// Waits until the answer has begun.
fn first_token(stream: &mut TokenStream) {
    assert!(matches!(stream.next_blocking(), Some(Event::Prompt { .. })));
    assert!(matches!(stream.next_blocking(), Some(Event::Token(_))));
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
    first_token(&mut stream);
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
    assert!(matches!(last, Some(Event::Finished { reason: FinishReason::Aborted, error: None, .. })));
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
    assert!(completion.error.unwrap().to_string().contains("unplugged"));
    let again = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert_eq!(again.token_ids(), toy_greedy(&[4, 5], 6, 0));
}

#[test]
fn an_answer_survives_a_stage_whose_place_others_take() {
    let mut model = ToyModel::new(64, 4);
    (model.fail_at, model.recovery) = (Some(3), Recovery::Done);
    let handle = start(model);
    let completion = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert_eq!((completion.error.as_ref(), completion.token_ids()), (None, toy_greedy(&[4, 5], 6, 0)));
}

#[test]
fn a_place_that_nobody_takes_is_waited_for_in_patience_and_no_longer() {
    let mut model = ToyModel::new(64, 4);
    (model.fail_at, model.recovery) = (Some(2), Recovery::Pending);
    let config = EngineConfig { patience_ms: 0, ..EngineConfig::default() };
    let handle = EngineHandle::start(Box::new(model), config).unwrap();
    let completion = handle.generate_blocking(Request::greedy(vec![4, 5], 6)).unwrap();
    assert_eq!((completion.tokens.len(), completion.reason), (1, FinishReason::Error));
    assert!(completion.error.unwrap().to_string().contains("unplugged"));
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
    fn set_adapter(&mut self, _: PolicyVersion, _: Option<&AdapterFile>) -> Result<(), StageError> {
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

#[test]
fn several_answers_come_out_of_streams_of_their_own() {
    let handle = start(ToyModel::new(64, 4));
    let request = sampled(vec![1, 2, 3, 4, 5], 6, 10);
    let streams = handle.submit_n(request.clone(), 3).unwrap();
    for (i, mut stream) in streams.into_iter().enumerate() {
        let mut got = Completion::default();
        while let Some(event) = stream.next_blocking() {
            got.take(event);
        }
        let mut single = request.clone();
        single.sampling.stream += i as u64;
        let alone = handle.generate_blocking(single).unwrap();
        assert_eq!((got.tokens, got.reason), (alone.tokens, alone.reason));
        assert_eq!(got.usage.completion_tokens, 6);
    }
    assert!(handle.submit_n(request, 5000).is_err());
}

#[test]
fn requests_in_flight_finish_on_the_old_weights_when_asked() {
    let config = EngineConfig { on_swap: OnSwap::Finish, ..EngineConfig::default() };
    let handle = EngineHandle::start(Box::new(ToyModel::new(512, 4)), config).unwrap();
    let before = handle.submit(Request::greedy(vec![1, 2], 900)).unwrap();
    let swapper = handle.clone();
    let swap =
        std::thread::spawn(move || swapper.swap_adapter_blocking(PolicyVersion(3), Some(b"new".to_vec())));
    // The swap is in the queue, or done, before its version shows; either way this one comes after `before`.
    let mut before = before;
    let mut old = Vec::new();
    while let Some(event) = before.next_blocking() {
        if let Event::Token(token) = event {
            old.push(token);
        }
    }
    swap.join().unwrap().unwrap();
    assert!(old.iter().all(|t| t.version == PolicyVersion(0)), "nothing in flight changes its weights");
    assert_eq!(old.iter().map(|t| t.id).collect::<Vec<_>>(), toy_greedy(&[1, 2], 900, 0));
    let after = handle.generate_blocking(Request::greedy(vec![1, 2], 5)).unwrap();
    let salt = b"new".iter().map(|b| u64::from(*b)).sum();
    assert_eq!(after.token_ids(), toy_greedy(&[1, 2], 5, salt));
    assert!(after.tokens.iter().all(|t| t.version == PolicyVersion(3)));
}

#[test]
fn all_weights_are_swapped_for_a_runner_that_was_made_meanwhile() {
    let handle = start(ToyModel::new(512, 4));
    let mut stream = handle.submit(Request::greedy(vec![1, 2], 900)).unwrap();
    first_token(&mut stream);
    let mut next = ToyModel::new(512, 4);
    next.salt = 77;
    handle.swap_weights_blocking(PolicyVersion(1), Box::new(next)).unwrap();
    let mut completion = Completion::default();
    while let Some(event) = stream.next_blocking() {
        completion.take(event);
    }
    // The first token was taken off the stream above; every token is that of its own version and all tokens before.
    let mut tokens = vec![1, 2, toy_greedy(&[1, 2], 1, 0)[0]];
    for token in &completion.tokens {
        let salt = if token.version.0 == 0 { 0 } else { 77 };
        assert_eq!(token.id, toy_greedy(&tokens, 1, salt)[0]);
        tokens.push(token.id);
    }
    assert!(completion.tokens.iter().map(|t| t.version).is_sorted());
    let other = handle.swap_weights_blocking(PolicyVersion(2), Box::new(ToyModel::new(512, 8))).unwrap_err();
    assert!(other.to_string().contains("another shape"), "{other}");
    assert_eq!(handle.version(), PolicyVersion(1));
}

#[test]
fn resident_adapters_go_along_with_a_swap_of_all_weights() {
    let handle = start(ToyModel::new(1024, 4));
    let salt = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum();
    handle.add_adapter_blocking("pirate", b"arr".to_vec()).unwrap();
    handle.add_adapter_blocking("parrot", b"polly".to_vec()).unwrap();
    let on = |name: &str, n| Request { adapter: Some(name.into()), ..Request::greedy(vec![1, 2], n) };
    let mut stream = handle.submit(on("pirate", 900)).unwrap();
    first_token(&mut stream);
    // Its request is in flight, so that it goes along as well.
    handle.remove_adapter("pirate").unwrap();
    handle.swap_weights_blocking(PolicyVersion(1), Box::new(ToyModel::new(1024, 4))).unwrap();
    let mut rest = Completion::default();
    while let Some(event) = stream.next_blocking() {
        rest.take(event);
    }
    assert_eq!(rest.token_ids(), toy_greedy(&[1, 2], 900, salt(b"arr"))[1..]);
    let parrot = handle.generate_blocking(on("parrot", 5)).unwrap();
    assert_eq!(parrot.token_ids(), toy_greedy(&[1, 2], 5, salt(b"polly")));
    // A runner that takes no adapters: nothing changes.
    let other = Box::new(Panics(ToyModel::new(1024, 4)));
    let refused = handle.swap_weights_blocking(PolicyVersion(2), other).unwrap_err();
    assert!(refused.to_string().contains("\"parrot\""), "{refused}");
    assert_eq!(handle.version(), PolicyVersion(1));
    let parrot = handle.generate_blocking(on("parrot", 5)).unwrap();
    assert_eq!(parrot.token_ids(), toy_greedy(&[1, 2], 5, salt(b"polly")));
}

#[tokio::test]
async fn each_swap_says_what_becomes_of_requests_in_flight() {
    let handle = start(ToyModel::new(1024, 4));
    let mut stream = handle.submit(Request::greedy(vec![1, 2], 4000)).unwrap();
    while !matches!(stream.next().await, Some(Event::Token(_))) {}
    handle.swap_adapter_as(PolicyVersion(1), Some(b"new".to_vec()), OnSwap::Abort).await.unwrap();
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Finished { reason: FinishReason::Aborted, .. })), "{last:?}");
    assert_eq!((handle.metrics().pages_used, handle.metrics().finished_aborted), (0, 1));

    let mut stream = handle.submit(Request::greedy(vec![1, 2], 300)).unwrap();
    handle.swap_adapter_as(PolicyVersion(2), None, OnSwap::Finish).await.unwrap();
    let mut versions = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Token(token) = event {
            versions.push(token.version);
        }
    }
    assert_eq!(versions, vec![PolicyVersion(1); 300]);
    assert_eq!(handle.version(), PolicyVersion(2));
}

/// The rest of a stream, and how it ended.
async fn rest(stream: &mut TokenStream) -> Completion {
    let mut completion = Completion::default();
    while let Some(event) = stream.next().await {
        completion.take(event);
    }
    completion
}

#[tokio::test]
async fn an_adapter_that_takes_the_place_of_another_says_what_becomes_of_requests_on_it() {
    let handle = start(ToyModel::new(4096, 4));
    let salt = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum();
    let on = |n| Request { adapter: Some("pirate".into()), ..Request::greedy(vec![1, 2], n) };
    handle.add_adapter("pirate", b"one".to_vec()).await.unwrap();
    let mut bystander = handle.submit(Request::greedy(vec![3], 4000)).unwrap();
    let mut stream = handle.submit(on(4000)).unwrap();
    while !matches!(stream.next().await, Some(Event::Token(_))) {}
    let metrics = handle.metrics();
    assert_eq!(metrics.running_adapters, ["pirate"]);
    assert_eq!(metrics.most_running, EngineConfig::default().running_sequences);
    let refused = handle.add_adapter_as("pirate", b"bad".to_vec(), OnSwap::Abort).await.unwrap_err();
    assert!(refused.to_string().contains("not an adapter"), "{refused}");

    // Switched: the tokens so far stay, all later ones are of the new adapter alone.
    handle.add_adapter_as("pirate", b"two".to_vec(), OnSwap::Recompute).await.unwrap();
    let switched = rest(&mut stream).await;
    let first = toy_greedy(&[1, 2], 1, salt(b"one"))[0];
    let ids = switched.token_ids();
    let unswitched = toy_greedy(&[1, 2, first], ids.len(), salt(b"one"));
    let kept = ids.iter().zip(&unswitched).take_while(|(got, old)| got == old).count();
    assert!(kept < ids.len(), "the switch comes before the end");
    let before = [&[1, 2, first][..], &ids[..kept]].concat();
    assert_eq!(ids[kept..], toy_greedy(&before, ids.len() - kept, salt(b"two")));

    // Left to finish, then ended.
    let mut stream = handle.submit(on(1500)).unwrap();
    while !matches!(stream.next().await, Some(Event::Token(_))) {}
    handle.add_adapter_as("pirate", b"three".to_vec(), OnSwap::Finish).await.unwrap();
    let finished = rest(&mut stream).await;
    assert_eq!(finished.token_ids(), toy_greedy(&[1, 2], 1500, salt(b"two"))[1..]);
    let mut stream = handle.submit(on(4000)).unwrap();
    while !matches!(stream.next().await, Some(Event::Token(_))) {}
    handle.add_adapter_as("pirate", b"four".to_vec(), OnSwap::Abort).await.unwrap();
    assert_eq!(rest(&mut stream).await.reason, FinishReason::Aborted);
    let after = handle.generate(on(5)).await.unwrap();
    assert_eq!(after.token_ids(), toy_greedy(&[1, 2], 5, salt(b"four")));

    assert_eq!(rest(&mut bystander).await.token_ids(), toy_greedy(&[3], 4000, 0));
    let metrics = handle.metrics();
    assert_eq!((metrics.finished_aborted, metrics.running_adapters.len()), (1, 0));
}

#[test]
fn what_requests_wait_for_is_measured() {
    let handle = start(ToyModel::new(64, 4));
    handle.generate_blocking(sampled(vec![1; 9], 12, 1)).unwrap();
    let times = handle.metrics().latencies;
    for one in [&times.queue, &times.prefill, &times.decode, &times.inference] {
        assert_eq!(one.count(), 1);
    }
    assert_eq!(times.time_per_token.count(), 1);
    assert!((times.time_per_token.sum() * 11.0 - times.decode.sum()).abs() < 1e-9);
    let parts = times.queue.sum() + times.inference.sum();
    assert!((times.prefill.sum() + times.decode.sum() - times.inference.sum()).abs() < 1e-9);
    assert!(parts <= times.end_to_end.sum() + 1e-9, "{parts} of {}", times.end_to_end.sum());
    assert_eq!((times.prompt_tokens.sum(), times.generated_tokens.sum()), (9.0, 12.0));
    assert_eq!(times.step_rows.sum(), 9.0 + 11.0);
}

#[test]
fn one_token_alone_has_no_time_between_tokens() {
    let handle = start(ToyModel::new(64, 4));
    handle.generate_blocking(Request::greedy(vec![1, 2], 1)).unwrap();
    let times = handle.metrics().latencies;
    assert_eq!((times.decode.count(), times.time_per_token.count()), (1, 0));
}

#[test]
fn scoring_leaves_nothing_behind_also_when_it_fails() {
    let mut model = ToyModel::new(64, 4);
    model.fail_at = Some(2);
    let ids = vec![1; 200];
    assert!(parallax_engine::score(&mut model, &ids).unwrap_err().to_string().contains("unplugged"));
    assert_eq!(model.closed, [0]);
    model.fail_at = None;
    assert_eq!(parallax_engine::score(&mut model, &ids).unwrap().logprobs.len(), 199);
}

#[test]
fn resident_adapters_are_named_by_requests() {
    let handle = start(ToyModel::new(64, 4));
    handle.add_adapter_blocking("pirate", b"arr".to_vec()).unwrap();
    let bad = handle.add_adapter_blocking("bad", b"bad".to_vec()).unwrap_err();
    assert!(bad.to_string().contains("not an adapter"));
    assert_eq!(handle.adapters().into_iter().collect::<Vec<_>>(), ["pirate"]);
    let request = Request { adapter: Some("pirate".into()), ..Request::greedy(vec![1, 2], 5) };
    let salt = b"arr".iter().map(|b| u64::from(*b)).sum();
    assert_eq!(handle.generate_blocking(request).unwrap().token_ids(), toy_greedy(&[1, 2], 5, salt));
    let unknown = Request { adapter: Some("parrot".into()), ..Request::greedy(vec![1], 1) };
    assert!(handle.submit(unknown).unwrap_err().to_string().contains("loaded are: pirate"));
}
