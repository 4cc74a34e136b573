//! Tools that a model may call, and whether it must.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use crate::markup::{MAX_NAME_BYTES, ToolSchema, is_of_name};

/// Tools of a request.
const MAX_TOOLS: usize = 128;

/// One tool.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// JSON schema of its arguments.
    pub parameters: Value,
    /// The model's calls are held to the schema.
    pub strict: bool,
}

/// What sampling holds calls to.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) enum HeldCalls {
    /// Nothing.
    #[default]
    Free,
    /// The answer is an object `{"name", "arguments"}`: one call of one of these.
    Whole(Vec<ToolSchema>),
    /// Every call that the answer makes, as the model writes calls, is one of these.
    Each(Vec<ToolSchema>),
    /// Nothing, unless the answer has a form: then what has not is calls of these.
    BesideForm(Vec<ToolSchema>),
}

/// Whether tools are called.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum ToolChoice {
    /// Never.
    None,
    /// As the model likes.
    #[default]
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// Arguments that are texts, by tool: every tool has its place, one that takes no texts an empty one.
pub(super) type TextArguments = std::collections::BTreeMap<String, std::collections::BTreeSet<String>>;

/// The tools of a request and how to choose among them.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Tools {
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    /// Keep one call at most.
    pub single: bool,
}

impl Tools {
    /// Checks that choice and tools go together.
    ///
    /// # Errors
    /// 400 naming `tool_choice`.
    pub(super) fn checked(self, body: &Fields<'_>) -> Result<Self, ApiError> {
        let needs_tools = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        if needs_tools && self.tools.is_empty() {
            return Err(body.fault("tool_choice", "asks for a call but there are no tools"));
        }
        if let ToolChoice::Named(name) = &self.choice
            && !self.tools.iter().any(|tool| tool.name == *name)
        {
            return Err(body.fault("tool_choice", format!("names the tool {name:?}, which is not in tools")));
        }
        if let Some(twice) =
            self.tools.iter().enumerate().find(|(i, t)| self.tools[..*i].iter().any(|o| o.name == t.name))
        {
            return Err(body.fault("tools", format!("has two tools named {:?}", twice.1.name)));
        }
        Ok(self)
    }

    /// Tools are offered to the model.
    pub(super) fn are_offered(&self) -> bool {
        !self.tools.is_empty() && self.choice != ToolChoice::None
    }

    /// What the template sees, in OpenAI's shape.
    pub(super) fn for_template(&self) -> Vec<Value> {
        if !self.are_offered() {
            return Vec::new();
        }
        let described = |tool: &Tool| {
            // In the order in which models have seen tools described.
            let mut function = json!({"name": tool.name});
            if let Some(description) = &tool.description {
                function["description"] = json!(description);
            }
            function["parameters"] = tool.parameters.clone();
            json!({"type": "function", "function": function})
        };
        self.tools.iter().map(described).collect()
    }

    /// What the schemas say is a text.
    pub(super) fn text_arguments(&self) -> TextArguments {
        let is_text = |schema: &Value| schema["type"] == "string";
        let of_tool = |tool: &Tool| {
            let properties = tool.parameters["properties"].as_object().into_iter().flatten();
            let texts = properties.filter(|(_, schema)| is_text(schema)).map(|(name, _)| name.clone());
            (tool.name.clone(), texts.collect())
        };
        self.tools.iter().map(of_tool).collect()
    }

    /// The answer is one call and nothing else.
    pub(super) fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// One call at most is given out.
    pub(super) fn is_single(&self) -> bool {
        self.single || self.is_forced()
    }

    /// What sampling holds the calls of an answer to.
    pub(super) fn held_calls(&self) -> HeldCalls {
        let any = json!({"type": "object"});
        let held = |tool: &Tool, by: &Value| {
            let mut arguments = by.clone();
            if names_no_parameters(by) {
                arguments["additionalProperties"] = json!(false);
            }
            ToolSchema { name: tool.name.clone(), arguments }
        };
        match &self.choice {
            ToolChoice::Required => {
                HeldCalls::Whole(self.tools.iter().map(|tool| held(tool, &tool.parameters)).collect())
            }
            ToolChoice::Named(name) => {
                let wanted = self.tools.iter().filter(|tool| tool.name == *name);
                HeldCalls::Whole(wanted.map(|tool| held(tool, &tool.parameters)).collect())
            }
            ToolChoice::Auto if !self.tools.is_empty() => {
                let schema = |tool: &Tool| held(tool, if tool.strict { &tool.parameters } else { &any });
                let each = self.tools.iter().map(schema).collect();
                let is_strict = self.tools.iter().any(|tool| tool.strict);
                if is_strict { HeldCalls::Each(each) } else { HeldCalls::BesideForm(each) }
            }
            ToolChoice::None | ToolChoice::Auto => HeldCalls::Free,
        }
    }
}

/// A tool whose schema says nothing but that its arguments are an object without properties takes none, whatever such a schema
/// admits.
fn names_no_parameters(schema: &Value) -> bool {
    const SILENT: [&str; 5] = ["type", "properties", "title", "description", "$schema"];
    let is_silent = |(key, value): (&String, &Value)| {
        SILENT.contains(&key.as_str()) || (key == "required" && *value == json!([]))
    };
    schema["properties"].as_object().is_some_and(Map::is_empty)
        && schema.as_object().into_iter().flatten().all(is_silent)
}

/// OpenAI's chat shape: `{"type": "function", "function": {"name", "description", "parameters"}}`; the responses shape has
/// the fields beside `type`.
///
/// # Errors
/// 400 naming the field.
pub(super) fn openai(body: &Fields<'_>) -> Result<Tools, ApiError> {
    let mut tools = Vec::new();
    for (path, item) in limited(body)? {
        let tool = Fields::of(item, path)?;
        match tool.required_text("type")? {
            "function" => {}
            other => return Err(tool.fault("type", format!("{other:?} is not supported: use \"function\""))),
        }
        let function = tool.object("function")?;
        tools.push(one(function.as_ref().unwrap_or(&tool), "parameters")?);
    }
    let choice = match body.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => {
                return Err(body.fault(
                    "tool_choice",
                    format!("must be \"none\", \"auto\", \"required\" or name a function, not {word:?}"),
                ));
            }
        },
        Some(value @ Value::Object(_)) => {
            let choice = Fields::of(value, "tool_choice")?;
            match choice.required_text("type")? {
                "function" => {}
                other => return Err(choice.fault("type", format!("must be \"function\", not {other:?}"))),
            }
            let named = choice.object("function")?;
            ToolChoice::Named(named.as_ref().unwrap_or(&choice).required_text("name")?.to_owned())
        }
        Some(other) => return Err(wrong("tool_choice", "a string or an object", other)),
    };
    let single = body.flag("parallel_tool_calls")? == Some(false);
    Tools { tools, choice, single }.checked(body)
}

/// Anthropic's shape: `{"name", "description", "input_schema"}`, `tool_choice: {"type": auto | any | tool | none}`.
///
/// # Errors
/// 400 naming the field.
pub(super) fn anthropic(body: &Fields<'_>) -> Result<Tools, ApiError> {
    let mut tools = Vec::new();
    for (path, item) in limited(body)? {
        let tool = Fields::of(item, path)?;
        match tool.text("type")? {
            None | Some("custom") => {}
            Some(other) => {
                return Err(tool.fault("type", format!("{other:?} is not supported by this server")));
            }
        }
        if !tool.has("input_schema") {
            return Err(tool.missing("input_schema"));
        }
        tools.push(one(&tool, "input_schema")?);
    }
    let (mut choice, mut single) = (ToolChoice::Auto, false);
    if let Some(chosen) = body.object("tool_choice")? {
        single = chosen.flag("disable_parallel_tool_use")?.unwrap_or(false);
        let words = [("auto", 0), ("any", 1), ("tool", 2), ("none", 3)];
        choice = match chosen.choice("type", &words)?.ok_or_else(|| chosen.missing("type"))? {
            0 => ToolChoice::Auto,
            1 => ToolChoice::Required,
            2 => ToolChoice::Named(chosen.required_text("name")?.to_owned()),
            _ => ToolChoice::None,
        };
    }
    Tools { tools, choice, single }.checked(body)
}

fn limited<'a>(body: &Fields<'a>) -> Result<Vec<(String, &'a Value)>, ApiError> {
    let items = body.list("tools")?.unwrap_or_default();
    if items.len() > MAX_TOOLS {
        return Err(
            body.fault("tools", format!("holds {} tools, at most {MAX_TOOLS} are taken", items.len()))
        );
    }
    Ok(items)
}

fn one(tool: &Fields<'_>, schema_field: &str) -> Result<Tool, ApiError> {
    let name = tool.required_text("name")?;
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_of_name) {
        return Err(tool.fault("name", format!("must be 1 to {MAX_NAME_BYTES} of a-z, A-Z, 0-9, _ - .")));
    }
    // A tool without parameters takes none.
    let mut parameters = match tool.get(schema_field) {
        None => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema.clone(),
        Some(other) => return Err(wrong(&tool.path(schema_field), "a JSON schema", other)),
    };
    match parameters.get("type") {
        None => parameters["type"] = json!("object"),
        Some(Value::String(kind)) if kind == "object" => {}
        Some(other) => {
            let why = format!("must have the type \"object\", not {other}");
            return Err(tool.fault(schema_field, why));
        }
    }
    let properties = parameters.get("properties").filter(|properties| !properties.is_null());
    if let Some(other) = properties.filter(|properties| !properties.is_object()) {
        return Err(wrong(&format!("{}.properties", tool.path(schema_field)), "an object", other));
    }
    let description = tool.text("description")?.map(str::to_owned);
    let strict = tool.flag("strict")?.unwrap_or(false);
    Ok(Tool { name: name.to_owned(), description, parameters, strict })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(value: &Value) -> Result<Tools, ApiError> {
        openai(&Fields::of(value, "").unwrap())
    }

    #[test]
    fn both_of_openais_shapes_and_anthropics_mean_the_same() {
        let schema = json!({"type": "object", "properties": {"c": {"type": "string"}}});
        let chat = json!({"tools": [{"type": "function", "function": {"name": "w", "parameters": schema}}],
                          "tool_choice": {"type": "function", "function": {"name": "w"}}});
        let responses = json!({"tools": [{"type": "function", "name": "w", "parameters": schema}],
                               "tool_choice": {"type": "function", "name": "w"}});
        let messages = json!({"tools": [{"name": "w", "input_schema": schema}],
                              "tool_choice": {"type": "tool", "name": "w"}});
        let chat = tools(&chat).unwrap();
        assert_eq!(chat, tools(&responses).unwrap());
        assert_eq!(chat, anthropic(&Fields::of(&messages, "").unwrap()).unwrap());
        assert_eq!(
            chat.held_calls(),
            HeldCalls::Whole(vec![ToolSchema { name: "w".into(), arguments: schema }])
        );
        assert_eq!(chat.for_template()[0]["function"]["name"], "w");
    }

    #[test]
    fn a_tool_without_parameters_is_called_without_arguments() {
        for function in [json!({"name": "now"}), json!({"name": "now", "parameters": {"properties": {}}})] {
            let body =
                json!({"tools": [{"type": "function", "function": function}], "tool_choice": "required"});
            let tools = tools(&body).unwrap();
            let HeldCalls::Whole(held) = tools.held_calls() else { panic!("the call is held") };
            assert_eq!(held[0].arguments["additionalProperties"], json!(false));
            assert_eq!(tools.for_template()[0]["function"]["parameters"].get("additionalProperties"), None);
        }
        let elsewhere = json!({"type": "object", "properties": {}, "required": [],
                               "oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"required": ["b"]}]});
        let body = json!({"tools": [{"type": "function", "function": {"name": "now", "parameters": elsewhere}}],
                          "tool_choice": "required"});
        let HeldCalls::Whole(held) = tools(&body).unwrap().held_calls() else { panic!("the call is held") };
        assert_eq!(held[0].arguments, elsewhere);
    }

    #[test]
    fn strict_tools_hold_calls_and_leave_others_free() {
        let schema = json!({"type": "object", "properties": {"c": {"type": "string"}}});
        let tool = |name: &str, strict: bool| json!({"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}});
        let body = json!({"tools": [tool("a", true), tool("b", false)]});
        let HeldCalls::Each(held) = tools(&body).unwrap().held_calls() else { panic!("each call is held") };
        assert_eq!((&held[0].arguments, &held[1].arguments), (&schema, &json!({"type": "object"})));
        let loose = json!({"tools": [tool("b", false)]});
        let HeldCalls::BesideForm(held) = tools(&loose).unwrap().held_calls() else { panic!("it is loose") };
        assert_eq!((held.len(), &held[0].arguments), (1, &json!({"type": "object"})));
        for free in [json!({"tools": [tool("a", true)], "tool_choice": "none"}), json!({"tools": []})] {
            assert_eq!(tools(&free).unwrap().held_calls(), HeldCalls::Free);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let good = json!({"type": "function", "function": {"name": "w"}});
        for (body, name) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{"function": {"name": "w"}}]}), "tools[0].type"),
            (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
            (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "w", "parameters": []}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "name": "w", "parameters": {"properties": 5}}]}),
                "tools[0].parameters.properties",
            ),
            (json!({"tools": [good, good]}), "two tools"),
            (json!({"tools": [good], "tool_choice": "maybe"}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": [good], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
                "\"x\"",
            ),
        ] {
            let error = tools(&body).expect_err(&body.to_string()).to_string();
            assert!(error.contains(name), "{body}: {error}");
        }
    }
}
