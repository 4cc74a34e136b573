//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::prompt::Rendering;
use super::{JsonBody, Server, conversation, logprobs, sampling, tools};

/// `{"prompt"}` or `{"messages"}` to tokens.
///
/// # Errors
/// 400 naming the field.
pub(super) async fn tokenize(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    server.read(body, |server, body, _| tokens(server, body)).await.map(Json)
}

fn tokens(server: &Server, body: &Fields<'_>) -> Result<Value, ApiError> {
    server.model(body.text("model")?)?;
    let special = body.flag("add_special_tokens")?;
    let with_texts = body.flag("return_token_strs")?.unwrap_or(false);
    let tokens = match (body.text("prompt")?, body.has("messages")) {
        (Some(_), true) => return Err(body.fault("messages", "and prompt are both there: send one")),
        (Some(prompt), false) => server.encode(prompt, special.unwrap_or(true))?,
        (None, true) => {
            let offered = tools::openai(body)?;
            let messages = conversation::chat(body)?;
            let prompt = server.render(messages, &offered, Rendering::read(body)?, "messages")?;
            server.encode(&prompt.text, special.unwrap_or(false))?
        }
        (None, false) => return Err(body.fault("prompt", "is missing: send prompt or messages")),
    };
    let texts = with_texts
        .then(|| tokens.iter().map(|id| logprobs::token_text(&server.vocabulary, *id)).collect::<Vec<_>>());
    let limit = server.state.engine.limits().context_tokens;
    Ok(json!({"count": tokens.len(), "max_model_len": limit, "tokens": tokens, "token_strs": texts}))
}

/// `{"tokens"}` to a text.
///
/// # Errors
/// 400 naming the field.
pub(super) async fn detokenize(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    server.read(body, |server, body, _| text(server, body)).await.map(Json)
}

fn text(server: &Server, body: &Fields<'_>) -> Result<Value, ApiError> {
    server.model(body.text("model")?)?;
    if !body.has("tokens") {
        return Err(body.missing("tokens"));
    }
    let ids = sampling::ids(body, "tokens")?;
    server.check_vocabulary("tokens", &ids)?;
    Ok(json!({"prompt": server.decode(&ids, true)?}))
}
