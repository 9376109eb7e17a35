use culvert_wire::control::ServerList;

use super::*;
use crate::test_support::{config, entries};

const SECOND: Duration = Duration::from_secs(1);

fn id(number: usize) -> ServerId {
    format!("server-{number}").parse().unwrap()
}

/// The set of servers with these numbers.
fn known(numbers: impl IntoIterator<Item = usize>) -> Arc<KnownServers> {
    let set: Vec<_> = numbers
        .into_iter()
        .map(|number| (id(number).to_string(), format!("10.1.0.{number}:8132")))
        .collect();
    let list: ServerList = entries(&set);
    Arc::new(KnownServers::accept(&list, None))
}

fn direct(numbers: impl IntoIterator<Item = usize>) -> (Direct, Instant) {
    let (mut direct, now) = (Direct::new(&config(&[]).sync), Instant::now());
    direct.on_known(&known(numbers), now, 0.5);
    (direct, now)
}

fn ids(due: &[(ServerId, Vec<SocketAddr>)]) -> Vec<&ServerId> {
    due.iter().map(|(id, _)| id).collect()
}

#[test]
fn servers_without_a_tunnel_are_dialed_at_once_and_only_so_many_at_the_same_time() {
    let (mut direct, now) = direct(1..=20);
    let connected = [id(1)];
    assert_eq!(direct.promising(&connected, now), 19);
    assert_eq!(direct.next(&connected, 0, now), Some(now));
    let due = direct.due(&connected, 0, now);
    assert_eq!(due.len(), MAX_RUNNING);
    assert!(!ids(&due).contains(&&id(1)));
    assert_eq!(direct.due(&connected, MAX_RUNNING, now), []);
    assert_eq!(direct.due(&connected, MAX_RUNNING - 1, now).len(), 1);
    assert_eq!(direct.next(&connected, MAX_RUNNING, now), Some(now + PATIENCE));
}

#[test]
fn a_dial_that_takes_long_or_failed_is_no_reason_not_to_look_elsewhere() {
    let (mut direct, now) = direct([1]);
    direct.due(&[], 0, now);
    assert_eq!(direct.promising(&[], now), 1);
    assert_eq!(direct.promising(&[], now + PATIENCE), 0);
    assert_eq!(direct.next(&[], 1, now + PATIENCE), None);
    let mut now = now;
    let mut delays = Vec::new();
    for _ in 0..8 {
        direct.on_ended(&id(1), false, now, 1.0);
        assert_eq!(direct.promising(&[], now), 0);
        let at = direct.next(&[], 0, now).unwrap();
        delays.push((at - now).as_secs_f64());
        now = at;
        assert_eq!(direct.due(&[], 0, now).len(), 1);
    }
    assert_eq!((delays[..3].to_vec(), delays[7]), (vec![1.0, 1.5, 2.25], 10.0));
    direct.on_ended(&id(1), true, now, 1.0);
    assert_eq!(direct.promising(&[], now), 1);
    assert_eq!(direct.next(&[], 0, now), Some(now + SECOND), "not at once, should it fail again");
}

#[test]
fn an_address_has_worked_once_a_dial_has_led_to_the_server_until_it_is_another() {
    let (mut direct, now) = direct([1, 2]);
    assert_eq!(direct.proven(&[]), 0);
    direct.on_ended(&id(1), true, now, 0.5);
    direct.on_ended(&id(2), false, now, 0.5);
    assert_eq!((direct.proven(&[]), direct.proven(&[id(1)])), (1, 0));
    direct.on_ended(&id(1), false, now, 0.5);
    assert_eq!(direct.proven(&[]), 1);
    direct.on_known(&known([2]), now, 0.5);
    direct.on_known(&known([1, 2]), now, 0.5);
    assert_eq!(direct.proven(&[]), 0);
}

#[test]
fn a_lost_server_is_dialed_after_a_delay_and_a_lost_path_at_once() {
    let (mut direct, now) = direct([1]);
    direct.on_lost(&id(1), LossCause::Server, now, 0.0);
    assert_eq!(direct.next(&[], 0, now), Some(now + SECOND / 2));
    direct.on_lost(&id(1), LossCause::Path, now, 0.0);
    assert_eq!(direct.next(&[], 0, now), Some(now));
    direct.on_lost(&id(9), LossCause::Path, now, 0.0);
}

#[test]
fn servers_come_with_a_delay_and_go_at_once() {
    let (mut direct, now) = direct([1]);
    let both = known([1, 2]);
    direct.on_known(&both, now, 0.0);
    assert_eq!(ids(&direct.due(&[], 0, now)), [&id(1)]);
    assert_eq!(direct.next(&[id(1)], 1, now), Some(now + SECOND / 2));
    // The same set again.
    direct.on_known(&both, now + SECOND, 1.0);
    assert_eq!(direct.next(&[id(1)], 1, now), Some(now + SECOND / 2));
    direct.on_known(&known([1]), now, 0.0);
    assert_eq!(direct.next(&[id(1)], 1, now), None);
    // A dial that had begun.
    direct.on_ended(&id(2), true, now, 0.0);
    assert_eq!(direct.promising(&[], now), 1);
}
