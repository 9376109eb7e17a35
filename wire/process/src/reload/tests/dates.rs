//! Dates of certificates and tokens, and the pairs that are taken by them.

use super::*;

/// The second of 2 January 2030, at which these tests are.
const NOW: i64 = 1_893_542_400;
const DAY: i64 = 24 * 60 * 60;

/// A rig with a pair in `crt` and `key`, and the serial number of what is presented.
fn rig_with_pair((certificate, key): &(String, String), clock: Clock) -> (Rig, Current<Vec<u8>>) {
    let rig = Rig::at(clock);
    write_pair(&rig, certificate, key);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let load = move |set: &mut Files| Ok(set.identity(&files, Role::Client)?.1.cert[0].to_vec());
    let presented = rig.reloads.add(rig.path("crt"), load).unwrap();
    (rig, presented)
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
