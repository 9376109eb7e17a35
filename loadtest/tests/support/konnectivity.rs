//! Konnectivity's programs and kube-apiserver's client library, built by Go.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use culvert_loadtest::{konnectivity_client::KonnectivityClient, peer::konnectivity::Programs};
use tokio::sync::OnceCell;

/// Skips the tests that need Go.
const WITHOUT_GO: &str = "CULVERT_WITHOUT_GO";

/// The programs.
#[derive(Debug)]
pub(crate) struct Konnectivity {
    pub(crate) programs: Programs,
    pub(crate) client: KonnectivityClient,
}

/// The programs, built once; `None` when the tests that need them are skipped.
pub(crate) async fn konnectivity() -> Option<&'static Konnectivity> {
    static KONNECTIVITY: OnceCell<Konnectivity> = OnceCell::const_new();
    if super::skips(WITHOUT_GO) {
        return None;
    }
    Some(KONNECTIVITY.get_or_init(build).await)
}

async fn build() -> Konnectivity {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let programs = Programs::build(folder).await.unwrap();
    let client = KonnectivityClient::build(folder).await.unwrap();
    let (Some(programs), Some(client)) = (programs, client) else {
        panic!("Go is not installed; {WITHOUT_GO}=1 skips the tests that need it")
    };
    Konnectivity { programs, client }
}

/// Konnectivity's integration tests as one program; `None` when the tests that need Go are skipped.
/// The first time takes minutes.
pub(crate) async fn suite() -> Option<PathBuf> {
    konnectivity().await?;
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("konnectivity-suite");
    let built = Command::new("go")
        .args(["test", "-c", "-o"])
        .arg(&program)
        .arg("sigs.k8s.io/apiserver-network-proxy/tests")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("konnectivity"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Some(program)
}
