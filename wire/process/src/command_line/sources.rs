//! Where the values of flags are from that are not on the command line.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::PathBuf,
};

use clap::{ArgMatches, Command, parser::ValueSource};

use crate::faults::{ConfigError, Origin};

/// The flags, by their names without hyphens, whose values are not from the command line.
#[derive(Clone, Debug, Default)]
pub struct Sources(HashMap<String, Source>);

#[derive(Clone, Debug)]
enum Source {
    /// A configuration file.
    File(PathBuf),
    /// This variable of the environment.
    Variable(String),
}

/// What stands before the colon of a text about the flag of this name.
struct Named<'a>(&'a Source, &'a str);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(Source::File(path), flag) => write!(f, "{}: {flag}", path.display()),
            Self(Source::Variable(name), _) => f.write_str(name),
        }
    }
}

impl Sources {
    /// The sources of parsed flags, of which these are from a file.
    pub(super) fn new(
        command: &Command,
        matches: &ArgMatches,
        from_file: Option<(PathBuf, HashSet<String>)>,
    ) -> Self {
        let mut sources = HashMap::new();
        if let Some((path, flags)) = from_file {
            let in_file = flags.into_iter().map(|flag| (flag, Source::File(path.clone())));
            sources.extend(in_file);
        }
        for arg in command.get_arguments() {
            let is_in_environment =
                matches.value_source(arg.get_id().as_str()) == Some(ValueSource::EnvVariable);
            if let (true, Some(flag), Some(name)) =
                (is_in_environment, arg.get_long(), arg.get_env())
            {
                let variable = Source::Variable(name.to_string_lossy().into_owned());
                sources.insert(flag.to_owned(), variable);
            }
        }
        Self(sources)
    }

    /// Has a fault of a flag name the source of the value.
    pub(super) fn set_origin(&self, error: &mut ConfigError) {
        match self.0.get(&*error.flag).filter(|_| error.origin == Origin::Flag) {
            Some(Source::File(path)) => error.origin = Origin::File(path.clone()),
            Some(Source::Variable(name)) => {
                (error.origin, error.flag) = (Origin::Variable, name.clone().into());
            }
            None => {}
        }
    }

    /// A text for the operator in which each line that begins with a flag and a colon names the
    /// source of its value.
    pub fn locate(&self, text: &str) -> String {
        let lines: Vec<_> = text.lines().map(|line| self.locate_line(line)).collect();
        lines.join("\n")
    }

    fn locate_line(&self, line: &str) -> String {
        let located = || {
            let (indent, rest) =
                line.split_once("--").filter(|(indent, _)| indent.trim().is_empty())?;
            let (flag, text) = rest.split_once(": ")?;
            let source = self.0.get(flag)?;
            Some(format!("{indent}{}: {text}", Named(source, flag)))
        };
        located().unwrap_or_else(|| line.to_owned())
    }
}
