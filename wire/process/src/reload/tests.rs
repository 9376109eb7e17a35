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

/// The second of 2 January 2030, at which these tests are.
const NOW: i64 = 1_893_542_400;
const DAY: i64 = 24 * 60 * 60;

/// A certificate for these years, and its key.
fn pair(from: i32, to: i32) -> (String, String) {
    let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// A rig with a pair in `crt` and `key`, and the serial number of what is presented.
fn rig_with_pair((certificate, key): &(String, String), clock: Clock) -> (Rig, Current<Vec<u8>>) {
    let rig = Rig::at(clock);
    write_pair(&rig, certificate, key);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let load = move |set: &mut Files| Ok(set.identity(&files, Role::Client)?.1.cert[0].to_vec());
    let presented = rig.reloads.add(rig.path("crt"), load).unwrap();
    (rig, presented)
}

fn write_pair(rig: &Rig, certificate: &str, key: &str) {
    rig.write("crt", certificate);
    rig.write("key", key);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_without_its_key_is_not_taken_before_the_key_is_there() {
    let (old, new) = (pair(2029, 2031), pair(2029, 2031));
    let (rig, mut presented) = rig_with_pair(&old, || NOW);
    let before = presented.get();
    rig.write("crt", &new.0);
    rig.reloads.look_at_all(false).await;
    assert_eq!((presented.get(), rig.count("crt")), (before, (0, 0)));
    rig.write("key", &new.1);
    rig.reloads.look_at_all(false).await;
    presented.replaced().await;
    assert_eq!(rig.count("crt"), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_half_written_certificate_is_not_taken() {
    let (old, new) = (pair(2029, 2031), pair(2029, 2031));
    let (rig, presented) = rig_with_pair(&old, || NOW);
    let before = presented.get();
    write_pair(&rig, &new.0[..new.0.len() / 2], &new.1);
    rig.reloads.look_at_all(false).await;
    assert_eq!((presented.get(), rig.count("crt")), (before, (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_does_not_replace_a_valid_one() {
    let (rig, presented) = rig_with_pair(&pair(2029, 2031), || NOW);
    let before = presented.get();
    let expired = pair(2020, 2029);
    write_pair(&rig, &expired.0, &expired.1);
    rig.reloads.look_on_request().await;
    assert_eq!((presented.get(), rig.count("crt")), (before, (0, 1)));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_replaces_one_that_has_expired_whatever_its_dates() {
    let (rig, mut presented) = rig_with_pair(&pair(2020, 2029), || NOW);
    let expired = pair(2020, 2028);
    write_pair(&rig, &expired.0, &expired.1);
    rig.reloads.look().await;
    presented.replaced().await;
}

/// The seconds by which the clock of the next test is ahead of [`NOW`].
static AHEAD: AtomicI64 = AtomicI64::new(0);

#[tokio::test(start_paused = true)]
async fn a_certificate_is_taken_when_it_becomes_valid() {
    let (rig, mut presented) =
        rig_with_pair(&pair(2029, 2032), || NOW + AHEAD.load(Ordering::Relaxed));
    let _keep = rig.keep();
    let early = pair(2031, 2033);
    write_pair(&rig, &early.0, &early.1);
    assert!(timeout(NOTICED, presented.replaced()).await.is_err());
    assert_eq!(rig.count("crt"), (0, 1));
    AHEAD.store(365 * DAY, Ordering::Relaxed);
    timeout(NOTICED, presented.replaced()).await.unwrap();
    assert_eq!(rig.count("crt"), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_expiry_of_the_current_certificate_is_a_metric() {
    let (rig, _presented) = rig_with_pair(&pair(2029, 2031), || NOW);
    assert_eq!(rig.expiry("crt"), 364 * DAY);
    let new = pair(2029, 2032);
    write_pair(&rig, &new.0, &new.1);
    rig.reloads.look().await;
    assert_eq!(rig.expiry("crt"), (364 + 365) * DAY);
    let bad = Path::new("no certificate");
    write_pair(&rig, &bad.display().to_string(), "");
    rig.reloads.look().await;
    assert_eq!(rig.expiry("crt"), (364 + 365) * DAY);
    assert_eq!(rig.of_file(NAMES.certificate.lifetime, "crt"), (3 * 365 * DAY).to_string());
}

/// A peer refuses a chain of which one certificate has expired.
#[tokio::test(start_paused = true)]
async fn a_chain_expires_with_the_first_of_its_certificates() {
    let (leaf, intermediate) = (pair(2029, 2030), pair(2020, 2040));
    let chain = (format!("{}{}", leaf.0, intermediate.0), leaf.1);
    let (rig, _presented) = rig_with_pair(&chain, || NOW);
    assert_eq!(rig.expiry("crt"), -DAY);
    assert_eq!(rig.of_file(NAMES.certificate.lifetime, "crt"), (365 * DAY).to_string());
}

#[tokio::test(start_paused = true)]
async fn a_ca_file_expires_with_the_next_of_its_certificates() {
    let rig = Rig::at(|| NOW);
    rig.write("ca", &[pair(2029, 2030).0, pair(2029, 2031).0, pair(2029, 2032).0].concat());
    let path = rig.path("ca");
    let _roots = rig.reloads.add(path.clone(), move |files: &mut Files| files.authorities(&path));
    assert_eq!(rig.expiry("ca"), 364 * DAY);
}

/// A token with these claims.
fn token(claims: &str) -> String {
    let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
    format!("{}.{}.{}\n", encode("{}"), encode(claims), encode("s"))
}

#[tokio::test(start_paused = true)]
async fn the_expiry_and_the_lifetime_of_a_token_are_metrics_if_it_has_them() {
    let rig = Rig::at(|| NOW);
    let write = |issued: i64, expires: i64| {
        rig.write("token", &token(&format!(r#"{{"iat":{issued},"exp":{expires}}}"#)));
    };
    write(NOW - 10, NOW + 20);
    let path = rig.path("token");
    let kept = rig.reloads.add(path.clone(), move |files: &mut Files| files.token(&path));
    let _kept = kept.unwrap();
    let values =
        || [NAMES.token.expiry, NAMES.token.lifetime].map(|metric| rig.of_file(metric, "token"));
    assert_eq!(values(), ["20", "30"]);
    write(NOW, NOW + 60);
    rig.reloads.look().await;
    assert_eq!(values(), ["60", "60"]);
    rig.write("token", "of another kind");
    rig.reloads.look().await;
    assert_eq!(values(), ["NaN", "NaN"]);
    let scrape = rig.metrics.render(|_| {});
    assert!(!scrape.contains("\nexpiry_seconds"), "{scrape}");
}

/// The seconds by which the clock of the next test is ahead of [`NOW`].
static HUNG_FOR: AtomicI64 = AtomicI64::new(0);

#[tokio::test(start_paused = true)]
async fn dates_are_checked_while_a_look_at_the_files_hangs() {
    let (rig, _presented) =
        rig_with_pair(&pair(2029, 2031), || NOW + HUNG_FOR.load(Ordering::Relaxed));
    let _keep = rig.keep();
    let _hung = rig.reloads.sets.clone().lock_owned().await; // as a look holds it
    sleep(NOTICED).await;
    HUNG_FOR.store(DAY, Ordering::Relaxed);
    sleep(NOTICED * 2).await;
    assert_eq!(rig.expiry("crt"), 363 * DAY);
}

#[test]
fn a_private_key_is_read_without_its_certificate() {
    let rig = Rig::new();
    let (certificate, key) = pair(2029, 2031);
    write_pair(&rig, &certificate, &key);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let (identity, _) = Files::default().identity(&files, Role::Client).unwrap();
    let alone = Files::default().private_key(&files.key).unwrap();
    assert_eq!(alone.secret_der(), identity.key.secret_der());
    let error = Files::default().private_key(&files.certificate).unwrap_err().to_string();
    let expected = format!("{}: holds no private key, but a", files.certificate.display());
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn a_key_of_another_certificate_is_reported_with_the_certificates_dates() {
    let (one, other) = (pair(2029, 2031), pair(2029, 2031));
    let rig = Rig::new();
    write_pair(&rig, &one.0, &other.1);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let error = Files::default().identity(&files, Role::Client).unwrap_err().to_string();
    let (certificate, key) = (files.certificate.display(), files.key.display());
    for part in [
        format!("{key}: the key is not that of the certificate"),
        "valid from 2029-01-01T00:00:00Z to 2031-01-01T00:00:00Z".into(),
        format!("in {certificate}"),
    ] {
        assert!(error.contains(&part), "{part} in {error}");
    }
}

/// The warnings about a pair of a certificate with these parameters in this role.
fn unfit(role: Role, set: impl FnOnce(&mut CertificateParams)) -> Vec<String> {
    let rig = Rig::new();
    let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    set(&mut params);
    let key = KeyPair::generate().unwrap();
    write_pair(&rig, &params.self_signed(&key).unwrap().pem(), &key.serialize_pem());
    let pair = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let mut files = Files::default();
    files.identity(&pair, role).unwrap();
    files.unfit().to_vec()
}

#[test]
fn a_certificate_that_peers_refuse_in_its_role_is_a_warning() {
    use rcgen::ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
    let nameless = |params: &mut CertificateParams| params.subject_alt_names.clear();
    let used = |usages: &[rcgen::ExtendedKeyUsagePurpose]| {
        let usages = usages.to_vec();
        move |params: &mut CertificateParams| params.extended_key_usages = usages
    };
    let found = unfit(Role::Server, nameless);
    assert!(found.len() == 1 && found[0].contains("has no subjectAltName"), "{found:?}");
    assert_eq!(unfit(Role::Client, nameless), [""; 0]);
    for (role, other, lacking) in [
        (Role::Server, ClientAuth, "extendedKeyUsage lacks serverAuth"),
        (Role::Client, ServerAuth, "extendedKeyUsage lacks clientAuth"),
    ] {
        let found = unfit(role, used(&[other]));
        assert!(found.len() == 1 && found[0].contains(lacking), "{role:?}: {found:?}");
        for usages in [&[][..], &[Any], &[ServerAuth, ClientAuth]] {
            assert_eq!(unfit(role, used(usages)), [""; 0], "{role:?} {usages:?}");
        }
    }
}

#[test]
fn a_certificate_that_a_ca_has_issued_is_a_warning_in_a_file_of_cas() {
    use rcgen::{BasicConstraints, DnType, IsCa, Issuer};
    let rig = Rig::new();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "ca");
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap().pem();
    let unfit = |pem: &str| {
        rig.write("ca", pem);
        let mut files = Files::default();
        files.authorities(&rig.path("ca")).unwrap();
        files.unfit().to_vec()
    };
    assert_eq!(unfit(&ca), [""; 0]);
    assert_eq!(unfit(&pair(2029, 2031).0), [""; 0], "its own CA");
    let found = unfit(&(ca + &leaf));
    assert!(found.len() == 1 && found[0].contains("is not a CA's"), "{found:?}");
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
