//! Flags from the command line and from a configuration file, with all their faults.
//!
//! [`go_flags`] has the rules for a single argument. Here every argument and every
//! key of the file is read alone, so that a value that cannot be parsed hides no other fault.

mod config_file;
mod reason;
mod sources;

use std::{collections::HashSet, ffi::OsString, path::PathBuf};

use clap::{Arg, ArgMatches, Command, Parser, error::ErrorKind};

pub use self::sources::Sources;
use self::{config_file::ConfigFile, reason::reason};
use crate::{
    faults::{ConfigError, ConfigErrors, Origin},
    go_flags::{self, Args, Exit, id_of},
};

/// Name of the flag that names the configuration file.
pub(crate) const CONFIG: &str = "config";

/// The flags of a process.
#[derive(Debug)]
pub struct CommandLine<F> {
    /// The flags, with the defaults of those that have a fault.
    pub flags: F,
    /// Words that belong to no flag, which Konnectivity ignores: a boolean's value without `=`, and
    /// what follows `--`.
    pub words: Vec<OsString>,
    /// Faults that were found while the flags were read.
    faults: Vec<ConfigError>,
    /// Where the values are from that are not on the command line.
    sources: Sources,
    /// The flags of the command line, where the configuration file could not be read: others may be
    /// in the file.
    only: Option<HashSet<String>>,
}

/// The command of a process with these flags, which may have a configuration file.
pub fn command<F: Parser>() -> Command {
    let config = Arg::new(CONFIG)
        .long(CONFIG)
        .value_name("FILE")
        .help_heading("Configuration file")
        .help(
            "TOML file with flags, as keys without hyphens. A flag on the command line and a variable \
             of the environment take precedence over the file, which is read once, at start",
        );
    go_flags::ignored_last(go_flags::command::<F>().arg(config))
}

impl<F: Parser> CommandLine<F> {
    /// Reads `args`, whose first item is the program's name, by `command`, which is that of
    /// [`command`] for `F`.
    ///
    /// # Errors
    /// With the text that `--help` and the like ask for.
    pub fn read(
        command: &mut Command,
        args: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, Exit> {
        let Args { program, flags, words } = Args::normalised(command, args);
        let mut faults = Vec::new();
        let mut given = Vec::new();
        for flag in flags {
            match check(command, &program, &flag) {
                Ok(_) => given.push(flag),
                Err(error) if is_request(&error) => return Err(error.into()),
                Err(error) => faults.push(fault_of_argument(&flag, &error)),
            }
        }
        let mut paths = given.iter().filter_map(|flag| flag.to_str()?.strip_prefix("--config="));
        let path = paths.next_back().filter(|path| !path.is_empty()).map(PathBuf::from);
        let (mut from_file, mut args) = (None, vec![program]);
        let mut only = None;
        if let Some(path) = path {
            let file = ConfigFile::read(&path, command, &mut faults);
            only = file.is_unread.then(|| given.iter().filter_map(name_of).collect());
            let named: HashSet<_> = given.iter().filter_map(|flag| id_of(command, flag)).collect();
            let entries = file.entries.into_iter().filter(|entry| {
                let is_set = entry.variable.as_deref().is_some_and(|name| {
                    std::env::var_os(name).is_some_and(|value| !value.is_empty())
                });
                !is_set && !named.contains(&entry.id)
            });
            let mut used = HashSet::new();
            for entry in entries {
                used.insert(entry.key);
                args.extend(entry.args);
            }
            from_file = Some((path, used));
        }
        args.extend(given);
        let matches = command.try_get_matches_from_mut(args)?;
        if let Some(exit) = go_flags::completion_of(command, &matches) {
            return Err(exit);
        }
        let sources = Sources::new(command, &matches, from_file);
        let flags = F::from_arg_matches(&matches)?;
        Ok(Self { flags, words, faults, sources, only })
    }

    /// Where the values are from that are not on the command line, for texts about them.
    pub fn sources(&self) -> Sources {
        self.sources.clone()
    }

    /// The configuration that `check` makes of the flags, if it and the flags have no fault.
    ///
    /// # Errors
    /// With all faults, and the words that belong to no flag. A flag whose value could not be read
    /// has no other fault, and where the configuration file could not be read the flags of the
    /// command line alone have one.
    pub fn configuration<C>(
        self,
        check: impl FnOnce(F) -> Result<C, ConfigErrors>,
    ) -> Result<(C, Vec<OsString>), ConfigErrors> {
        let Self { flags, words, mut faults, sources, only } = self;
        let errors = match check(flags) {
            Ok(config) if faults.is_empty() => return Ok((config, words)),
            Ok(_) => Vec::new(),
            Err(errors) => errors.into_vec(),
        };
        let unread: HashSet<_> = faults.iter().map(|fault| fault.flag.to_string()).collect();
        for mut error in errors {
            let is_elsewhere = only.as_ref().is_some_and(|only| !only.contains(&*error.flag));
            if unread.contains(&*error.flag) || is_elsewhere {
                continue;
            }
            sources.set_origin(&mut error);
            faults.push(error);
        }
        // Alone they are no fault, but a command whose name is mistyped is one of them.
        faults.extend(words.iter().map(|word| ConfigError {
            flag: format!("{word:?}").into(),
            origin: Origin::Argument,
            reason: "is no command and belongs to no flag; see --help".into(),
        }));
        Err(ConfigErrors::from(faults))
    }
}

/// The fault of one argument alone. Help names the program as `program` does.
fn check(
    command: &mut Command,
    program: &OsString,
    flag: &OsString,
) -> Result<ArgMatches, clap::Error> {
    command.try_get_matches_from_mut([program, flag])
}

/// The name in a normalised flag.
fn name_of(flag: &OsString) -> Option<String> {
    let name = flag.to_str()?.strip_prefix("--")?.split('=').next()?;
    Some(name.to_owned())
}

/// Whether this is no fault, but a text that was asked for.
fn is_request(error: &clap::Error) -> bool {
    matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
}

fn fault_of_argument(flag: &OsString, error: &clap::Error) -> ConfigError {
    let text = flag.to_string_lossy();
    let name = text.split('=').next().unwrap_or_default();
    let (origin, name) = match name.strip_prefix("--") {
        Some(name) => (Origin::Flag, name),
        None => (Origin::Argument, name),
    };
    ConfigError { flag: name.to_owned().into(), origin, reason: reason(error, "--") }
}

#[cfg(test)]
mod tests;
