//! The engine inside another application: `embed-engine [MODEL [QUESTION]]` streams an answer, blocking, then samples two, async.
#![expect(clippy::print_stdout, reason = "what it says is what it is for")]

use anyhow::Context as _;
use parallax_engine::{EngineConfig, EngineHandle, Event, Request, local::LocalStage};
use parallax_model::{ChatMessage, Checkpoint, LoadOptions};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let checkpoint = Checkpoint::resolve(args.next().as_deref().unwrap_or("tiny"))?;
    let question = args.next().unwrap_or_else(|| "What is 12+30?".to_owned());
    let template = checkpoint.chat_template()?.context("the model has no chat template")?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = tokenizer.encode(&template.render(&[ChatMessage::new("user", question)], true)?, false)?;
    let stage = LocalStage::load(&checkpoint, &LoadOptions::whole(&checkpoint))?;
    let engine = EngineHandle::start(Box::new(stage), EngineConfig::default())?;
    let mut request = Request { prompt, ..Request::default() };
    (request.sampling.max_tokens, request.sampling.stop_ids) = (64, checkpoint.config().eos.clone());
    let (mut stream, mut text) = (engine.submit(request.clone())?, tokenizer.stream());
    while let Some(event) = stream.next_blocking() {
        if let Event::Token(token) = event {
            print!("{}", text.push(token.id)?);
        }
    }
    println!("{}", text.finish()?);
    request.sampling.temperature = 1.0;
    tokio::runtime::Runtime::new()?.block_on(async {
        for mut stream in engine.submit_n(request, 2)? {
            let mut text = tokenizer.stream();
            while let Some(event) = stream.next().await {
                if let Event::Token(token) = event {
                    print!("{}", text.push(token.id)?);
                }
            }
            println!("{}", text.finish()?);
        }
        Ok(())
    })
}
