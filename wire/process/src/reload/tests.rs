use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::{AtomicI64, Ordering},
    time::SystemTime,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::faults::CertificatePair;

mod certificates;
mod dates;

/// Files in a folder, and the value that they are read into: their text, unless it is `bad`.
struct Rig {
    folder: tempfile::TempDir,
    metrics: Metrics,
    reloads: Reloads,
}

const NAMES: ReloadMetrics = ReloadMetrics {
    reloads: "reloads_total",
    failing: "failing",
    certificate: LifeMetrics { expiry: "expiry_seconds", lifetime: "lifetime_seconds" },
    token: LifeMetrics { expiry: "token_expiry_seconds", lifetime: "token_lifetime_seconds" },
};

impl Rig {
    fn new() -> Self {
        Self::at(|| 0)
    }

    fn at(clock: Clock) -> Self {
        let metrics = Metrics::new("1", &[]).unwrap();
        let reloads = Reloads::with_clock(&metrics, NAMES, clock);
        Self { folder: tempfile::tempdir().unwrap(), metrics, reloads }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// The text of a file.
    fn add(&self, name: &str) -> Current<String> {
        self.try_add(name).unwrap()
    }

    fn try_add(&self, name: &str) -> Result<Current<String>, LoadError> {
        let path = self.path(name);
        self.reloads.add(path.clone(), move |files: &mut Files| {
            let text = String::from_utf8(files.read(&path)?).unwrap();
            if text == "bad" { Err(LoadError::new("it is bad")) } else { Ok(text) }
        })
    }

    fn keep(&self) -> AbortOnDropHandle<()> {
        let reloads = self.reloads.clone();
        culvert_transport::task::owned(async move { reloads.keep().await })
    }

    /// Reloads of this file that succeeded and that failed, as a scrape shows them.
    fn count(&self, name: &str) -> (u64, u64) {
        let of = |result| {
            let file = self.path(name).display().to_string();
            let series = format!("{}{{file=\"{file}\",result=\"{result}\"}} ", NAMES.reloads);
            self.value(&series).parse().unwrap()
        };
        (of("ok"), of("failed"))
    }

    fn expiry(&self, name: &str) -> i64 {
        self.of_file(NAMES.certificate.expiry, name).parse().unwrap()
    }

    /// Whether the contents of this file cannot be used.
    fn is_failing(&self, name: &str) -> bool {
        self.of_file(NAMES.failing, name) == "1"
    }

    /// Value of this metric of a file.
    fn of_file(&self, metric: &str, name: &str) -> String {
        let file = self.path(name).display().to_string();
        self.value(&format!("{metric}{{file=\"{file}\"}} "))
    }

    fn value(&self, series: &str) -> String {
        let scrape = self.metrics.render(|_| {});
        let value = scrape.lines().find_map(|line| line.strip_prefix(series));
        value.unwrap_or_else(|| panic!("{series} in {scrape}")).to_owned()
    }
}

/// A certificate for these years, and its key.
fn pair(from: i32, to: i32) -> (String, String) {
    let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// Writes a pair into `crt` and `key`.
fn write_pair(rig: &Rig, certificate: &str, key: &str) {
    rig.write("crt", certificate);
    rig.write("key", key);
}

/// Time within which a change is noticed, and reported if it is bad.
const NOTICED: Duration = Duration::from_secs(12);

#[tokio::test(start_paused = true)]
async fn changed_contents_are_taken_within_the_interval() {
    let rig = Rig::new();
    rig.write("a", "old");
    let mut value = rig.add("a");
    assert_eq!(rig.count("a"), (0, 0), "the first read is no reload");
    let _keep = rig.keep();
    rig.write("a", "new");
    timeout(NOTICED, value.replaced()).await.unwrap();
    assert_eq!((value.get().as_str(), rig.count("a")), ("new", (1, 0)));
}

#[tokio::test(start_paused = true)]
async fn the_same_contents_with_a_new_time_are_no_change() {
    let rig = Rig::new();
    rig.write("a", "old");
    let mut value = rig.add("a");
    let _keep = rig.keep();
    rig.write("a", "old");
    let file = fs::File::options().write(true).open(rig.path("a")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert!(timeout(NOTICED * 3, value.replaced()).await.is_err());
    assert_eq!(rig.count("a"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn other_contents_with_the_same_time_and_size_are_a_change() {
    let rig = Rig::new();
    rig.write("a", "old");
    let time = fs::metadata(rig.path("a")).unwrap().modified().unwrap();
    let mut value = rig.add("a");
    let _keep = rig.keep();
    rig.write("a", "new");
    fs::File::options().write(true).open(rig.path("a")).unwrap().set_modified(time).unwrap();
    timeout(NOTICED, value.replaced()).await.unwrap();
    assert_eq!(*value.get(), "new");
}

/// As kubelet updates a Secret volume: `a` is a link into `..data`, which is a link that is
/// replaced.
#[tokio::test(start_paused = true)]
async fn a_swapped_symbolic_link_is_a_change() {
    let rig = Rig::new();
    for (version, text) in [("..1", "old"), ("..2", "new")] {
        fs::create_dir(rig.path(version)).unwrap();
        rig.write(&format!("{version}/a"), text);
    }
    symlink("..1", rig.path("..data")).unwrap();
    symlink("..data/a", rig.path("a")).unwrap();
    let mut value = rig.add("a");
    assert_eq!(*value.get(), "old");
    let _keep = rig.keep();
    symlink("..2", rig.path("..tmp")).unwrap();
    fs::rename(rig.path("..tmp"), rig.path("..data")).unwrap();
    fs::remove_dir_all(rig.path("..1")).unwrap();
    timeout(NOTICED, value.replaced()).await.unwrap();
    assert_eq!(*value.get(), "new");
}

#[tokio::test(start_paused = true)]
async fn the_last_good_contents_stay_in_use_until_others_are_good() {
    let rig = Rig::new();
    rig.write("a", "old");
    let mut value = rig.add("a");
    let _keep = rig.keep();
    assert!(!rig.is_failing("a"));
    rig.write("a", "bad");
    assert!(timeout(NOTICED * 3, value.replaced()).await.is_err());
    assert_eq!((rig.count("a"), rig.is_failing("a")), ((0, 1), true), "once for each contents");
    fs::remove_file(rig.path("a")).unwrap();
    assert!(timeout(NOTICED * 3, value.replaced()).await.is_err());
    assert_eq!((value.get().as_str(), rig.count("a")), ("old", (0, 2)));
    assert!(rig.is_failing("a"));
    rig.write("a", "new");
    timeout(NOTICED, value.replaced()).await.unwrap();
    assert_eq!((value.get().as_str(), rig.count("a")), ("new", (1, 2)));
    assert!(!rig.is_failing("a"));
}

#[tokio::test(start_paused = true)]
async fn contents_that_are_bad_for_a_moment_are_no_failure() {
    let rig = Rig::new();
    rig.write("a", "old");
    let mut value = rig.add("a");
    rig.write("a", "bad");
    assert_eq!(rig.reloads.look_at_all(false).await, Some(false), "it is not settled");
    rig.write("a", "new");
    assert_eq!(rig.reloads.look_at_all(false).await, Some(true));
    value.replaced().await;
    assert_eq!((value.get().as_str(), rig.count("a")), ("new", (1, 0)));
}

#[tokio::test(start_paused = true)]
async fn bad_contents_that_give_way_to_those_in_use_are_forgotten() {
    let rig = Rig::new();
    rig.write("a", "old");
    let _value = rig.add("a");
    for text in ["bad", "old", "bad", "old"] {
        rig.write("a", text);
        rig.reloads.look_at_all(false).await;
        assert!(!rig.is_failing("a"), "{text}");
    }
    assert_eq!(rig.count("a"), (0, 0));
    rig.write("a", "bad");
    rig.reloads.look_on_request().await;
    assert!(rig.is_failing("a"));
    rig.write("a", "old");
    rig.reloads.look_at_all(false).await;
    assert!(!rig.is_failing("a"));
}

#[tokio::test(start_paused = true)]
async fn a_request_reports_bad_contents_at_once_and_counts_them_once() {
    let rig = Rig::new();
    rig.write("a", "old");
    let value = rig.add("a");
    rig.write("a", "bad");
    for _ in 0..2 {
        rig.reloads.look_on_request().await;
        assert_eq!((value.get().as_str(), rig.count("a")), ("old", (0, 1)));
    }
    rig.reloads.look_at_all(false).await;
    assert_eq!(rig.count("a"), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_bad_set_does_not_keep_others_from_being_taken() {
    let rig = Rig::new();
    rig.write("a", "old");
    rig.write("b", "old");
    let (first, second) = (rig.add("a"), rig.add("b"));
    rig.write("a", "bad");
    rig.write("b", "new");
    rig.reloads.look().await;
    assert_eq!((first.get().as_str(), second.get().as_str()), ("old", "new"));
}

#[tokio::test(start_paused = true)]
async fn a_part_of_the_process_can_have_the_files_looked_at_soon() {
    let rig = Rig::new();
    rig.write("a", "old");
    let mut value = rig.add("a");
    let _keep = rig.keep();
    rig.write("a", "new");
    rig.reloads.ask();
    timeout(SETTLE_TIME * 2, value.replaced()).await.unwrap();
    let begun = Instant::now();
    // However often it asks.
    for text in ["1", "2", "3"] {
        rig.write("a", text);
        rig.reloads.ask();
        value.replaced().await;
    }
    assert!(begun.elapsed() >= SETTLE_TIME * 3, "{:?}", begun.elapsed());
}

#[test]
fn what_cannot_be_used_at_first_is_an_error_with_the_files_name() {
    let rig = Rig::new();
    let error = rig.try_add("absent").unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot read {}: ", rig.path("absent").display())));
    rig.write("a", "bad");
    assert_eq!(rig.try_add("a").unwrap_err(), LoadError::new("it is bad"));
}

/// Set in the process that has no descriptors.
const CHILD: &str = "CULVERT_TEST_WITHOUT_DESCRIPTORS";

#[test]
fn a_shortage_of_descriptors_is_no_change_of_a_file() {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "reload::tests::child_without_descriptors"]).env(CHILD, "1");
    let ended = child.output().unwrap();
    let text = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
}

/// The process of the test above; nothing otherwise.
#[tokio::test(start_paused = true)]
async fn child_without_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (rig, (soft, hard)) = (Rig::new(), getrlimit(Resource::RLIMIT_NOFILE).unwrap());
    rig.write("a", "old");
    rig.write("b", "old");
    let values = (rig.add("a"), rig.add("b"));
    rig.write("a", "new");
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    for _ in 0..2 {
        assert_eq!(rig.reloads.look_at_all(true).await, None);
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert_eq!((rig.count("a"), rig.count("b")), ((0, 0), (0, 0)));
    assert_eq!(rig.reloads.look_at_all(false).await, Some(true));
    assert_eq!((values.0.get().as_str(), values.1.get().as_str()), ("new", "old"));
    assert_eq!(rig.count("a"), (1, 0));
}
