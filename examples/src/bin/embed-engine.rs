//! The engine inside another application: `embed-engine [MODEL]` streams one answer, blocking, then samples two, async.
#![expect(clippy::print_stdout, reason = "what it says is what it is for")]

use parallax_engine::{EngineConfig, EngineHandle, Event, Request, SamplingParams, local::LocalStage};
use parallax_model::{Checkpoint, LoadOptions};

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "tiny".to_owned());
    let checkpoint = Checkpoint::resolve(&model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let stage = LocalStage::load(&checkpoint, &LoadOptions::whole(&checkpoint))?;
    let engine = EngineHandle::start(Box::new(stage), EngineConfig::default())?;
    let stop_ids = checkpoint.config().eos.clone();
    let sampling = SamplingParams { max_tokens: 32, stop_ids, ..SamplingParams::default() };
    let prompt = tokenizer.encode("What is 12+7?", true)?;
    let mut request = Request { prompt, sampling, ..Request::default() };

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
