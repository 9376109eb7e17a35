//! kube-apiserver's own client library, as a program (see `loadtest/konnectivity-client`).

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    sync::mpsc::UnboundedSender,
};

use crate::{
    go,
    link::Host,
    load::{Plan, Sample},
};

/// The Konnectivity client, built from the pinned Go module.
#[derive(Clone, Debug)]
pub struct KonnectivityClient {
    program: PathBuf,
}

impl KonnectivityClient {
    /// Builds the program into `folder`; `None` where there is no Go.
    ///
    /// # Errors
    /// When Go is there and cannot build it.
    pub async fn build(folder: &Path) -> anyhow::Result<Option<Self>> {
        let Some(go) = go::find() else { return Ok(None) };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("konnectivity-client");
        let program = folder.join("konnectivity-client");
        let built = Command::new(&go)
            .args(["build", "-o"])
            .arg(&program)
            .arg(".")
            .current_dir(source)
            .output()
            .await;
        match built {
            Ok(built) if built.status.success() => Ok(Some(Self { program })),
            Ok(built) => {
                let error = String::from_utf8_lossy(&built.stderr).into_owned();
                Err(anyhow::anyhow!(error).context("go build in loadtest/konnectivity-client"))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn command(&self, command: &str, uds: &Path, target: &str, flags: &[&str]) -> Command {
        let mut run = Command::new(&self.program);
        run.arg(command).arg("--uds").arg(uds).args(["--target", target]).args(flags);
        run.kill_on_drop(true).stdin(Stdio::null());
        run
    }

    /// Runs one command to its end: the line it printed, and its exit code.
    ///
    /// # Errors
    /// When it cannot be run or prints something else.
    pub async fn run(
        &self,
        command: &str,
        uds: &Path,
        target: &str,
        flags: &[&str],
    ) -> anyhow::Result<(serde_json::Value, Option<i32>)> {
        let ended = self.command(command, uds, target, flags).output().await?;
        let line = String::from_utf8_lossy(&ended.stdout);
        let answer = serde_json::from_str(&line).with_context(|| {
            format!(
                "konnectivity-client {command}: {line}{}",
                String::from_utf8_lossy(&ended.stderr)
            )
        })?;
        Ok((answer, ended.status.code()))
    }

    /// Starts one command that goes on until its standard input ends.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn start(
        &self,
        command: &str,
        uds: &Path,
        target: &str,
        flags: &[&str],
    ) -> io::Result<Child> {
        let mut run = self.command(command, uds, target, flags);
        run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    }

    /// Carries out a plan on `host` through the server's socket, and sends its samples.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn load(
        &self,
        loadtest: &Path,
        host: &Host,
        uds: &Path,
        plan: &Plan,
        samples: UnboundedSender<Sample>,
    ) -> anyhow::Result<()> {
        let mut child = Command::new(loadtest)
            .arg("exec")
            .arg(host.path())
            .arg(&self.program)
            .args(["load", "--uds"])
            .arg(uds)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut stdin = child.stdin.take().context("the Konnectivity client has no input")?;
        let stdout = child.stdout.take().context("the Konnectivity client has no output")?;
        stdin.write_all(&serde_json::to_vec(plan)?).await?;
        drop(stdin);
        #[expect(clippy::disallowed_methods, reason = "it ends with the receiver of its samples")]
        drop(tokio::spawn(async move {
            let _child = child;
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let Ok(sample) = serde_json::from_str(&line) else { return };
                if samples.send(sample).is_err() {
                    return;
                }
            }
        }));
        Ok(())
    }
}
