//! A conversation becomes the text that the model continues, by the model's own template.

use std::time::SystemTime;

use parallax_model::Conversation;
use serde_json::{Map, Value, json};

use super::conversation::take_prefill;
use super::error::ApiError;
use super::fields::Fields;
use super::tools::Tools;
use super::{Server, turns};

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    pub text: String,
    /// It has opened the model's thoughts.
    pub in_reasoning: bool,
}

/// What a template sees beside messages and tools.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rendering {
    pub variables: Map<String, Value>,
    /// Go on with the assistant's last message instead of beginning a new one.
    pub continues: bool,
    /// Open the assistant's turn.
    pub opens_turn: bool,
}

impl Rendering {
    /// vLLM's fields: `chat_template_kwargs`, `add_generation_prompt`, `continue_final_message`; OpenAI's
    /// `reasoning_effort`.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn read(body: &Fields<'_>) -> Result<Self, ApiError> {
        let mut variables = Map::new();
        if let Some(given) = body.object("chat_template_kwargs")? {
            given.entries().for_each(|(name, value)| {
                variables.insert(name.to_owned(), value.clone());
            });
        }
        let efforts = [
            ("none", "none"),
            ("minimal", "minimal"),
            ("low", "low"),
            ("medium", "medium"),
            ("high", "high"),
        ];
        if let Some(effort) = body.choice("reasoning_effort", &efforts)? {
            variables.insert("reasoning_effort".to_owned(), json!(effort));
            // Qwen's and its kin's templates know only on and off.
            variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
        }
        let continues = body.flag("continue_final_message")?.unwrap_or(false);
        let opens_turn = body.flag("add_generation_prompt")?.unwrap_or(!continues);
        if continues && opens_turn {
            let why = "cannot be true together with continue_final_message";
            return Err(body.fault("add_generation_prompt", why));
        }
        Ok(Self { variables, continues, opens_turn: opens_turn || continues })
    }
}

impl Server {
    /// Renders a conversation; `field` is where the messages came from.
    ///
    /// # Errors
    /// 400 when the model has no template or its template refuses the conversation.
    pub(super) fn render(
        &self,
        mut messages: Vec<Value>,
        tools: &Tools,
        rendering: Rendering,
        field: &str,
    ) -> Result<Prompt, ApiError> {
        let template = self.state.template.as_ref().ok_or_else(|| {
            ApiError::invalid(Some(field), "this model has no chat template: use /v1/completions")
        })?;
        let prefill = if rendering.continues { take_prefill(&mut messages) } else { None };
        if rendering.continues && prefill.is_none() {
            let why = "continue_final_message needs a last message of the assistant that holds text";
            return Err(ApiError::invalid(Some("continue_final_message"), why));
        }
        let (messages, tools) = turns::shape(self.dialect, messages, tools.for_template());
        let conversation = Conversation {
            messages,
            tools,
            variables: rendering.variables,
            date: Some(date(SystemTime::now())),
        };
        let mut text = template.render_conversation(&conversation, rendering.opens_turn).map_err(|e| {
            ApiError::invalid(Some(field), format!("the model's chat template refuses this: {e}"))
        })?;
        let in_reasoning = prefill.is_none() && text.trim_end().ends_with("<think>");
        text.push_str(&prefill.unwrap_or_default());
        Ok(Prompt { text, in_reasoning })
    }
}

/// A date as templates show it: `21 Nov 2026`.
fn date(now: SystemTime) -> String {
    // "Sat, 21 Nov 2026 11:00:00 GMT".
    httpdate::fmt_http_date(now)[5..16].to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::date;

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(date(UNIX_EPOCH), "01 Jan 1970");
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(1_795_219_200)), "21 Nov 2026");
    }
}
