//! Formats of texts whose rules the grammar compiler only comes near to: February has 29 days in leap years alone
//! (RFC 3339, appendix C), and a 60th second falls on midnight UTC, which no regular expression over an offset says, so
//! none is written.

use serde_json::Value;

/// A day that exists; the compiler sees to the other months.
const DAY: &str = "^(?:[0-9]{4}-(?:0[13-9]|1[0-2])-|[0-9]{4}-02-(?:[01][0-9]|2[0-8])\
                   |(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)";
/// No leap second.
const SECOND: &str = ":[0-9]{2}:[0-5]";

/// Adds to every `format` of a schema what the compiler leaves out.
pub(super) fn sharpen(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(sharpen),
        Value::Object(fields) => {
            for (keyword, value) in fields.iter_mut() {
                match keyword.as_str() {
                    // Values, not schemas.
                    "const" | "enum" | "default" | "examples" | "required" => {}
                    // Names of the user's own, then schemas.
                    "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas" => {
                        value.as_object_mut().into_iter().flatten().for_each(|(_, schema)| sharpen(schema));
                    }
                    _ => sharpen(value),
                }
            }
            let patterns: &[&str] = match fields.get("format").and_then(Value::as_str) {
                Some("date") => &[DAY],
                Some("time") => &[SECOND],
                Some("date-time") => &[DAY, SECOND],
                _ => return,
            };
            let also = fields.entry("allOf").or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(also) = also {
                also.extend(patterns.iter().map(|pattern| serde_json::json!({"pattern": pattern})));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_are_sharpened_and_values_left_alone() {
        let value = json!({"format": "date"});
        let mut schema = json!({"properties": {"format": {"type": "string", "format": "time"}, "enum": {"enum": [value]}},
                                "items": [{"format": "date-time", "allOf": [{"maxLength": 9}]}], "const": value});
        sharpen(&mut schema);
        assert_eq!(schema["properties"]["format"]["allOf"], json!([{"pattern": SECOND}]));
        assert_eq!((&schema["const"], &schema["properties"]["enum"]["enum"][0]), (&value, &value));
        assert_eq!(
            schema["items"][0]["allOf"],
            json!([{"maxLength": 9}, {"pattern": DAY}, {"pattern": SECOND}])
        );
        assert!(schema.get("allOf").is_none());
    }
}
