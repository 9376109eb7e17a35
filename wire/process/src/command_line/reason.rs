//! What clap reports of one argument, without the usage around it.

use std::error::Error as _;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// The fault, and what would be right. `prefix` is what stands before the name of a flag where the
/// argument was written.
pub(super) fn reason(error: &clap::Error, prefix: &str) -> String {
    let value = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => value.as_str(),
        _ => "",
    };
    match error.kind() {
        ErrorKind::UnknownArgument => match suggestion(error) {
            Some(name) => format!("is unknown; did you mean {prefix}{name}?"),
            None => "is unknown; see --help".into(),
        },
        ErrorKind::InvalidValue if value.is_empty() => "needs a value".into(),
        ErrorKind::InvalidValue => match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(valid)) => {
                format!("{value:?} is unknown; use {}", alternatives(valid))
            }
            _ => format!("{value:?} is not a valid value"),
        },
        ErrorKind::ValueValidation => match error.source().map(ToString::to_string) {
            // That of Rust's integers.
            Some(text) if text.contains("invalid digit") => {
                format!("{value:?} is not a whole number")
            }
            Some(text) if text.contains("invalid float") => format!("{value:?} is not a number"),
            Some(text) => format!("{value:?}: {text}"),
            None => format!("{value:?} is not a valid value"),
        },
        _ => {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").to_owned()
        }
    }
}

/// The name of a flag that the unknown one resembles.
fn suggestion(error: &clap::Error) -> Option<String> {
    let name = match error.get(ContextKind::SuggestedArg)? {
        ContextValue::String(name) => name,
        ContextValue::Strings(names) => names.first()?,
        _ => return None,
    };
    Some(name.trim_start_matches('-').to_owned())
}

/// `a, b or c`.
fn alternatives(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [name] => name.clone(),
        [others @ .., last] => format!("{} or {last}", others.join(", ")),
    }
}
