//! The configuration file: a TOML table whose keys are flags.

use std::{any::TypeId, collections::HashMap, ffi::OsString, path::Path};

use clap::{Arg, ArgAction, Command};
use culvert_transport::tls::read_file;
use toml::{Table, Value};

use super::{CONFIG, check, reason::reason};
use crate::{
    byte_size::ByteSize,
    faults::{ConfigError, Origin},
    go_duration::GoDuration,
    go_flags::{arg_of, joined},
};

/// Number of keys with a fault after which the others are not looked at: it is another program's file.
const MAX_FAULTS: usize = 100;

/// What a configuration file has, without what cannot be used.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// Its keys, sorted.
    pub(super) entries: Vec<Entry>,
    /// Whether it could not be read as a whole.
    pub(super) is_unread: bool,
}

/// A key of the file, as arguments.
#[derive(Debug)]
pub(super) struct Entry {
    /// The flag's name.
    pub(super) key: String,
    /// clap's name of the flag.
    pub(super) id: String,
    /// The variable of the environment that takes precedence.
    pub(super) variable: Option<String>,
    /// `--name=value`, once for each value.
    pub(super) args: Vec<OsString>,
}

impl ConfigFile {
    /// Reads a file of at most 4 MiB. Its faults go to `faults`.
    pub(super) fn read(path: &Path, command: &mut Command, faults: &mut Vec<ConfigError>) -> Self {
        let table = match table(path) {
            Ok(table) => table,
            Err(reason) => {
                faults.push(ConfigError { flag: CONFIG.into(), origin: Origin::Flag, reason });
                return Self { entries: Vec::new(), is_unread: true };
            }
        };
        let mut entries: Vec<Entry> = Vec::new();
        let mut written: HashMap<String, String> = HashMap::new();
        let before = faults.len();
        for (index, (key, value)) in table.iter().enumerate() {
            if faults.len() - before == MAX_FAULTS {
                let rest = table.len() - index;
                let file = path.display();
                let reason = format!(
                    "{file} has {MAX_FAULTS} faults before {key}, and {rest} keys are unread"
                );
                faults.push(ConfigError { flag: CONFIG.into(), origin: Origin::Flag, reason });
                return Self { entries, is_unread: true };
            }
            let entry = entry(command, key, value).and_then(|entry| {
                match written.insert(entry.id.clone(), key.clone()) {
                    Some(other) => Err(format!("is the same flag as {other}; keep one of them")),
                    None => Ok(entry),
                }
            });
            match entry {
                Ok(entry) => entries.push(entry),
                Err(reason) => faults.push(ConfigError {
                    flag: key.clone().into(),
                    origin: Origin::File(path.into()),
                    reason,
                }),
            }
        }
        Self { entries, is_unread: false }
    }
}

/// The file's contents.
fn table(path: &Path) -> Result<Table, String> {
    let file = path.display();
    let contents = read_file(path).map_err(|error| format!("cannot read {file}: {error}"))?;
    let text = String::from_utf8(contents).map_err(|_| format!("{file} is not UTF-8 text"))?;
    text.parse::<Table>().map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        let message = error.message().replace('\n', ", ");
        format!("{file}, line {line}: not TOML: {message}; write lines such as key = \"value\"")
    })
}

fn entry(command: &mut Command, key: &str, value: &Value) -> Result<Entry, String> {
    let name = key.replace('_', "-");
    if matches!(value, Value::Table(_)) {
        return Err("is a table; write all keys at the top of the file, without [sections]".into());
    }
    let is_elsewhere = [CONFIG, "completion", "help", "version"].contains(&name.as_str());
    if is_elsewhere {
        return Err("belongs on the command line".into());
    }
    let Some(arg) = arg_of(command, &name).cloned() else {
        let error = check(command, &program(), &joined(&name, None)).err();
        return Err(error.map_or_else(|| "is unknown".into(), |error| reason(&error, "")));
    };
    let long = arg.get_long().unwrap_or(&name).to_owned();
    let args: Vec<_> =
        texts(&arg, &long, value)?.iter().map(|text| joined(&long, Some(text.as_ref()))).collect();
    for arg in &args {
        check(command, &program(), arg).map_err(|error| reason(&error, ""))?;
    }
    let variable = arg.get_env().and_then(|name| name.to_str()).map(str::to_owned);
    Ok(Entry { key: long, id: arg.get_id().to_string(), variable, args })
}

/// The program of a check, whose faults do not name it.
fn program() -> OsString {
    "program".into()
}

/// The type of a flag's value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Boolean,
    Number,
    /// Text that may be a number: a duration of 0, or a size in bytes.
    Quantity,
    Text,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        let parsed = arg.get_value_parser().type_id();
        let is = |types: &[TypeId]| types.iter().any(|id| parsed == *id);
        if is(&[TypeId::of::<bool>()]) {
            Self::Boolean
        } else if is(&[TypeId::of::<i64>(), TypeId::of::<i32>(), TypeId::of::<u64>()])
            || is(&[TypeId::of::<u32>(), TypeId::of::<u16>(), TypeId::of::<f32>()])
        {
            Self::Number
        } else if is(&[TypeId::of::<GoDuration>(), TypeId::of::<ByteSize>()]) {
            Self::Quantity
        } else {
            Self::Text
        }
    }
}

/// The values of a key, as on the command line.
fn texts(arg: &Arg, name: &str, value: &Value) -> Result<Vec<String>, String> {
    let kind = Kind::of(arg);
    let is_repeatable = matches!(arg.get_action(), ArgAction::Append);
    let values = arg.get_value_names().unwrap_or_default();
    let is_list = is_repeatable || values.iter().any(|name| name == "LIST");
    let Value::Array(items) = value else { return Ok(vec![text(kind, name, value)?]) };
    if !is_list {
        return Err(format!("takes one value and not a list; write {}", example(kind, name)));
    }
    let items = items.iter().map(|item| text(kind, name, item)).collect::<Result<Vec<_>, _>>()?;
    Ok(if is_repeatable { items } else { vec![items.join(",")] })
}

fn text(kind: Kind, name: &str, value: &Value) -> Result<String, String> {
    match (kind, value) {
        (Kind::Boolean, Value::Boolean(value)) => Ok(value.to_string()),
        (Kind::Number | Kind::Quantity, Value::Integer(value)) => Ok(value.to_string()),
        (Kind::Number, Value::Float(value)) => Ok(value.to_string()),
        (Kind::Quantity | Kind::Text, Value::String(value)) => Ok(value.clone()),
        (kind, value) => {
            let (found, example) = (found(value), example(kind, name));
            Err(format!("has the wrong type, {found}; write {example}"))
        }
    }
}

fn found(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text in quotes",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false without quotes",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

fn example(kind: Kind, name: &str) -> String {
    match kind {
        Kind::Boolean => format!("{name} = true or {name} = false"),
        Kind::Number => format!("a number without quotes, as in {name} = 1"),
        Kind::Quantity => format!("a number with its unit in quotes, as in {name} = \"…\""),
        Kind::Text => format!("a text in quotes, as in {name} = \"…\""),
    }
}
