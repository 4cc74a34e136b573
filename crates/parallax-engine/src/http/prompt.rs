//! A conversation becomes the text that the model continues, by the model's own template.

use parallax_model::Conversation;
use parallax_model::chat_template::DateTime;
use serde_json::{Map, Value, json};

use super::conversation::take_prefill;
use super::error::ApiError;
use super::fields::Fields;
use super::tools::Tools;
use super::{Server, turns, unix_seconds};

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
        let continues = body.flag("continue_final_message")?.unwrap_or(false);
        let opens_turn = body.flag("add_generation_prompt")?.unwrap_or(!continues);
        if continues && opens_turn {
            let why = "cannot be true together with continue_final_message";
            return Err(body.fault("add_generation_prompt", why));
        }
        let mut rendering = Self { variables, continues, opens_turn: opens_turn || continues };
        rendering.take_effort(body, "reasoning_effort")?;
        Ok(rendering)
    }

    /// How hard to think, if the field `name` says so.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn take_effort(&mut self, fields: &Fields<'_>, name: &str) -> Result<(), ApiError> {
        let efforts = ["none", "minimal", "low", "medium", "high", "xhigh", "max"].map(|word| (word, word));
        if let Some(effort) = fields.choice(name, &efforts)? {
            self.variables.insert("reasoning_effort".to_owned(), json!(effort));
            // Qwen's and its kin's templates know only on and off.
            self.variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
        }
        Ok(())
    }

    /// Anthropic's `output_config.effort`: how hard to think; whether to think at all says `thinking`.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn take_output_effort(&mut self, config: &Fields<'_>) -> Result<(), ApiError> {
        let efforts = ["low", "medium", "high", "xhigh", "max"].map(|word| (word, word));
        if let Some(effort) = config.choice("effort", &efforts)? {
            self.variables.insert("reasoning_effort".to_owned(), json!(effort));
        }
        Ok(())
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
            now: Some(DateTime::from_unix_seconds(unix_seconds())),
        };
        let mut text = template.render_conversation(&conversation, rendering.opens_turn).map_err(|e| {
            ApiError::invalid(Some(field), format!("the model's chat template refuses this: {e}"))
        })?;
        let in_reasoning = prefill.is_none() && text.trim_end().ends_with("<think>");
        text.push_str(&prefill.unwrap_or_default());
        Ok(Prompt { text, in_reasoning })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efforts_of_both_apis_reach_the_template() {
        for (effort, thinks) in [("max", true), ("minimal", true), ("none", false)] {
            let body = json!({"reasoning_effort": effort});
            let rendering = Rendering::read(&Fields::of(&body, "").unwrap()).unwrap();
            let wanted = json!({"reasoning_effort": effort, "enable_thinking": thinks});
            assert_eq!(Value::Object(rendering.variables), wanted);
        }
        let of_output = |effort: &str| {
            let config = json!({"effort": effort});
            let mut rendering = Rendering::default();
            rendering.take_output_effort(&Fields::of(&config, "output_config").unwrap())?;
            Ok::<_, ApiError>(Value::Object(rendering.variables))
        };
        assert_eq!(of_output("low").unwrap(), json!({"reasoning_effort": "low"}));
        let refused = of_output("none").unwrap_err().to_string();
        assert!(refused.contains("output_config.effort"), "{refused}");
    }
}
