//! One page about a run: its figures and its plots in a single HTML file that needs nothing else.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222;background:#fff}\
h1{font-size:1.5rem}table{border-collapse:collapse;margin:1rem 0}td{padding:.2rem 1.2rem .2rem 0;vertical-align:top}\
td+td{font-variant-numeric:tabular-nums}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(30rem,1fr));gap:1rem}\
figure{margin:0;border:1px solid #ddd}svg{width:100%;height:auto}";

/// The page of a report and its plots.
///
/// # Errors
/// A plot that cannot be read.
pub fn page(report: &Value, plots: &[PathBuf]) -> Result<String> {
    let title = format!("{} on {}", words(&report["model"]), words(&report["env"]));
    let title = escaped(&title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<table>\n"
    );
    rows(&mut page, "", report);
    page.push_str("</table>\n<div class=\"plots\">\n");
    for plot in plots {
        let svg = std::fs::read_to_string(plot).with_context(|| format!("reading {}", plot.display()))?;
        let _ = writeln!(page, "<figure>{svg}</figure>");
    }
    page.push_str("</div></body></html>\n");
    Ok(page)
}

/// A row for each figure, those within others under the names of both. The plots are below.
fn rows(page: &mut String, within: &str, value: &Value) {
    for (name, value) in value.as_object().into_iter().flatten().filter(|(name, _)| *name != "plots") {
        let name = format!("{within}{}", name.replace('_', " "));
        match value {
            Value::Object(_) => rows(page, &format!("{name}: "), value),
            Value::Null => {}
            _ => {
                let _ =
                    writeln!(page, "<tr><td>{}</td><td>{}</td></tr>", escaped(&name), escaped(&words(value)));
            }
        }
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) if n.is_f64() => {
            let n = n.as_f64().unwrap_or_default();
            if n.abs() >= 100.0 { format!("{n:.1}") } else { format!("{n:.4}") }
        }
        Value::Array(items) => items.iter().map(words).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Text that came from a model or a peer is text.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_rows_and_words_are_no_markup() {
        let report = json!({"model": "tiny", "env": "kuhn", "eval_after": 0.84999, "seconds": 123.456,
            "staleness": {"by_age": [3, 1], "mean": 0.25}, "chat": {"reply": "<script>alert(1)</script>"}, "cheater": null});
        let page = page(&report, &[]).unwrap();
        for row in [
            "<tr><td>eval after</td><td>0.8500</td></tr>",
            "<tr><td>seconds</td><td>123.5</td></tr>",
            "<tr><td>staleness: by age</td><td>3, 1</td></tr>",
            "<tr><td>chat: reply</td><td>&lt;script&gt;alert(1)&lt;/script&gt;</td></tr>",
        ] {
            assert!(page.contains(row), "{row} in {page}");
        }
        assert!(!page.contains("cheater") && !page.contains("<script"));
        assert!(super::page(&report, &["nowhere.svg".into()]).is_err());
    }
}
