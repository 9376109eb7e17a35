//! Files that flags may name, for the tests of both sides' configurations.

use std::{ffi::OsString, fs, path::PathBuf, sync::LazyLock};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use crate::{
    cli::ProcessConfig,
    command_line::{self, CommandLine},
    invocation::Invocation,
};

/// A kubeconfig that can be used.
const KUBECONFIG: &str = r#"
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"#;

/// A certificate, which is its own CA, and its key.
static PAIR: LazyLock<[String; 2]> = LazyLock::new(|| {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    [params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem()]
});

/// A directory with the files `crt`, `key`, `ca`, `kubeconfig`, `token` and `reset`.
#[derive(Debug)]
pub struct FlagFiles {
    dir: tempfile::TempDir,
}

impl FlagFiles {
    /// Writes the files.
    ///
    /// # Panics
    /// When they cannot be written.
    #[expect(clippy::new_without_default, reason = "it writes files")]
    pub fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().expect("a directory") };
        let [certificate, key] = &*PAIR;
        for (name, contents) in [
            ("crt", certificate.as_str()),
            ("key", key),
            ("ca", certificate),
            ("kubeconfig", KUBECONFIG),
            ("token", "secret"),
            ("reset", "secret"),
        ] {
            fs::write(files.path(name), contents).expect("a file");
        }
        files
    }

    /// Path of a file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `args` with `@name` standing for the path of that file.
    pub fn expand(&self, args: &[&str]) -> Vec<String> {
        let dir = self.path("").display().to_string();
        args.iter().map(|arg| arg.replace('@', &dir)).collect()
    }

    /// The configuration of a program that is started under this name with these arguments,
    /// expanded.
    ///
    /// # Errors
    /// With the text that the program prints.
    pub fn config<C: ProcessConfig>(&self, argv0: &str, args: &[&str]) -> Result<C, String> {
        let args = [argv0.to_owned()].into_iter().chain(self.expand(args)).map(OsString::from);
        let mut command = command_line::command::<C::Flags>();
        let line = CommandLine::read(&mut command, args).map_err(|exit| exit.text)?;
        let invocation = Invocation::from_argv0(Some(argv0.as_ref()));
        let config = line.configuration(|flags| C::from_flags(flags, invocation));
        config.map(|(config, _)| config).map_err(|errors| errors.to_string())
    }
}
