//! Whether anything that ends fits a JSON schema: one that demands a value of its own kind inside of itself can be compiled and
//! followed, but never to an end.

use serde_json::{Map, Value};

/// Schemas that are looked at; one that is larger still counts as good.
const MAX_VISITS: usize = 10_000;
/// Schemas within each other, through references too; what is deeper counts as good. Each takes its share of the stack.
const MAX_DEPTH: usize = 128;

/// False where every value that fits would have to contain another that fits the same schema.
pub(super) fn has_end(schema: &Value) -> bool {
    Search { root: schema, open: Vec::new(), depth: 0, visits: 0 }.ends(schema)
}

struct Search<'a> {
    root: &'a Value,
    /// References that are being followed.
    open: Vec<&'a str>,
    depth: usize,
    visits: usize,
}

impl<'a> Search<'a> {
    fn ends(&mut self, schema: &'a Value) -> bool {
        self.visits += 1;
        let Some(fields) = schema.as_object() else { return true };
        if self.visits > MAX_VISITS || self.depth == MAX_DEPTH {
            return true;
        }
        self.depth += 1;
        let ends = self.fields_end(schema, fields);
        self.depth -= 1;
        ends
    }

    fn fields_end(&mut self, schema: &'a Value, fields: &'a Map<String, Value>) -> bool {
        let all = |keyword: &str| fields.get(keyword).and_then(Value::as_array).into_iter().flatten();
        let one_of = |search: &mut Self, keyword: &str| {
            let mut ways = all(keyword).peekable();
            ways.peek().is_none() || ways.any(|schema| search.ends(schema))
        };
        self.reference_ends(fields.get("$ref"))
            && all("allOf").all(|schema| self.ends(schema))
            && one_of(self, "anyOf")
            && one_of(self, "oneOf")
            && self.some_type_ends(schema)
    }

    fn reference_ends(&mut self, reference: Option<&'a Value>) -> bool {
        let Some(reference) = reference.and_then(Value::as_str) else { return true };
        if self.open.contains(&reference) {
            return false;
        }
        let root = self.root;
        // The compiler complains of what is not there.
        let Some(target) = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer)) else {
            return true;
        };
        self.open.push(reference);
        let ends = self.ends(target);
        self.open.pop();
        ends
    }

    /// What is no object and no array always ends.
    fn some_type_ends(&mut self, schema: &'a Value) -> bool {
        if schema.get("const").is_some() || schema.get("enum").is_some() {
            return true;
        }
        let types: Vec<&Value> = match &schema["type"] {
            Value::Array(types) => types.iter().collect(),
            Value::Null => return true,
            one => vec![one],
        };
        types.into_iter().any(|kind| match kind.as_str() {
            Some("object") => self.object_ends(schema),
            Some("array") => self.array_ends(schema),
            _ => true,
        })
    }

    fn object_ends(&mut self, schema: &'a Value) -> bool {
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        required.into_iter().all(|name| {
            let others =
                || schema.get("additionalProperties").filter(|_| schema.get("patternProperties").is_none());
            let described = schema["properties"].get(name).or_else(others);
            described.is_none_or(|schema| self.ends(schema))
        })
    }

    fn array_ends(&mut self, schema: &'a Value) -> bool {
        let least = schema["minItems"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let first: Vec<&Value> = schema["prefixItems"].as_array().into_iter().flatten().take(least).collect();
        let rest = schema.get("items").filter(|_| first.len() < least);
        first.into_iter().chain(rest).all(|schema| self.ends(schema))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::has_end;

    #[test]
    fn schemas_that_go_on_for_ever_are_told_from_those_that_may_stop() {
        let node = |rest: serde_json::Value| json!({"type": "object", "properties": {"next": rest}, "required": ["next"]});
        let itself = json!({"$ref": "#"});
        let list = json!({"$defs": {"n": node(json!({"$ref": "#/$defs/n"}))}, "$ref": "#/$defs/n"});
        let both = json!({"$defs": {"a": node(json!({"$ref": "#/$defs/b"})), "b": node(json!({"$ref": "#/$defs/a"}))},
                          "allOf": [{"$ref": "#/$defs/a"}]});
        let full = json!({"type": "array", "items": itself, "minItems": 1});
        for endless in [itself.clone(), node(itself.clone()), list, both, full] {
            assert!(!has_end(&endless), "{endless}");
        }
        let optional = json!({"type": "object", "properties": {"next": itself}});
        let either = node(json!({"anyOf": [itself, {"type": "null"}]}));
        let mixed = json!({"type": ["object", "null"], "properties": {"next": itself}, "required": ["next"]});
        let empty = json!({"type": "array", "items": itself});
        let listed = json!({"enum": [1], "properties": {"next": itself}, "required": ["next"]});
        // Whether the pattern fits the name, nobody looks.
        let patterns = json!({"type": "object", "required": ["a"], "patternProperties": {"a": {}}, "additionalProperties": itself});
        // The compiler says what is wrong with these.
        let broken = json!({"anyOf": {"a": 1}, "oneOf": []});
        for finite in [optional, either, mixed, empty, listed, patterns, broken, json!(true), json!({})] {
            assert!(has_end(&finite), "{finite}");
        }
    }

    #[test]
    fn a_schema_of_many_ways_is_not_walked_for_ever() {
        let mut definitions = serde_json::Map::new();
        for i in 0..60 {
            let next = json!({"$ref": format!("#/$defs/{}", i + 1)});
            definitions.insert(i.to_string(), json!({"allOf": [next, next]}));
        }
        definitions.insert("60".to_owned(), json!({"type": "string"}));
        assert!(has_end(&json!({"$defs": definitions, "$ref": "#/$defs/0"})));
    }

    #[test]
    fn a_long_way_of_references_does_not_use_up_the_stack() {
        const N: usize = 9_000;
        let definitions: serde_json::Map<String, serde_json::Value> = (0..N)
            .map(|i| (i.to_string(), json!({"allOf": [{"$ref": format!("#/$defs/{}", (i + 1) % N)}]})))
            .collect();
        let schema = json!({"$defs": definitions, "$ref": "#/$defs/0"});
        let small = std::thread::Builder::new().stack_size(512 * 1024);
        let ends = small.spawn(move || has_end(&schema)).unwrap().join().unwrap();
        assert!(ends, "it is too deep to tell");
    }
}
