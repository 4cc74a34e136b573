//! A conversation becomes the text that the model continues, by the model's own template.

use parallax_model::Conversation;
use serde_json::{Map, Value, json};

use super::Server;
use super::conversation::take_prefill;
use super::error::ApiError;
use super::fields::Fields;
use super::tools::Tools;

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
        let conversation = Conversation {
            messages,
            tools: tools.for_template(),
            variables: rendering.variables,
            date: Some(date(super::unix_seconds())),
        };
        let mut text = template.render_conversation(&conversation, rendering.opens_turn).map_err(|e| {
            ApiError::invalid(Some(field), format!("the model's chat template refuses this: {e}"))
        })?;
        let in_reasoning = prefill.is_none() && text.trim_end().ends_with("<think>");
        text.push_str(&prefill.unwrap_or_default());
        Ok(Prompt { text, in_reasoning })
    }
}

/// A date as templates show it: `21 Nov 2026`. Days to a date after Howard Hinnant's `civil_from_days`.
fn date(unix_seconds: u64) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = unix_seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{day:02} {} {year}", MONTHS[usize::try_from(month).expect("at most twelve") - 1])
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(date(0), "01 Jan 1970");
        assert_eq!(date(951_782_400), "29 Feb 2000");
        assert_eq!(date(1_795_219_200), "21 Nov 2026");
        assert_eq!(date(4_107_542_399), "28 Feb 2100");
        assert_eq!(date(4_107_542_400), "01 Mar 2100");
    }
}
