use culvert_process::kubernetes::{
    Timestamp,
    leases::{ADDRESS_ANNOTATION, Leases},
};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};

use super::*;

fn config(advertised: Option<&str>, addresses: &[(&str, &str)]) -> ServerSetConfig {
    let mut config = ServerSetConfig::default();
    let own = advertised.into_iter().flat_map(|text| text.split(','));
    config.advertised.extend(own.map(|address| address.parse::<SocketAddr>().unwrap()));
    for (id, address) in addresses {
        let addresses = config.addresses.entry(id.parse().unwrap()).or_default();
        addresses.insert(address.parse().unwrap());
    }
    config
}

fn set(config: &ServerSetConfig, count: u32, leases: bool) -> ServerSet {
    ServerSet::new("own".parse().unwrap(), 8132, config, count, leases)
}

/// The count and the entries that agents are sent.
fn sent(set: &ServerSet) -> (u32, Vec<(String, String)>) {
    let sent = set.subscribe().borrow().clone();
    let entry = |entry: &ServerEntry| (entry.id.to_string(), entry.address.as_str().to_owned());
    (sent.server_count, sent.servers.iter().map(entry).collect())
}

fn entries_of(entries: &[(&str, &str)]) -> Vec<(String, String)> {
    entries.iter().map(|(id, address)| ((*id).to_owned(), (*address).to_owned())).collect()
}

/// Records valid Leases of these holders.
pub(crate) fn lease(set: &ServerSet, holders: &[(&str, Option<&str>)]) {
    let lease = |(id, address): &(&str, Option<&str>)| Lease {
        metadata: ObjectMeta {
            name: Some(format!("lease of {id}")),
            annotations: address
                .map(|address| [(ADDRESS_ANNOTATION.to_owned(), address.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some((*id).to_owned()),
            renew_time: Some(MicroTime(Timestamp::now())),
            lease_duration_seconds: Some(30),
            ..LeaseSpec::default()
        }),
    };
    let mut leases = Leases::default();
    leases.on_list(holders.iter().map(lease));
    set.set_leased(leases.valid(Timestamp::now()).unwrap());
}

#[test]
fn a_server_without_flags_knows_no_set() {
    let set = set(&ServerSetConfig::default(), 3, false);
    assert_eq!(sent(&set), (3, vec![]));
    assert_eq!(set.counts(), [("known", 0), ("unknown", 0)]);
}

#[test]
fn flags_name_this_server_and_others() {
    let config = config(Some("10.0.0.1:0"), &[("b", "10.0.0.2:8132")]);
    let set = set(&config, 1, false);
    let entries = entries_of(&[("b", "10.0.0.2:8132"), ("own", "10.0.0.1:8132")]);
    assert_eq!(sent(&set), (2, entries));
    assert_eq!(set.advertised().unwrap(), "10.0.0.1:8132");
}

#[test]
fn a_server_with_two_addresses_is_sent_with_both_from_flags_and_from_leases() {
    let own = Some("10.0.0.1:0,[fd00::1]:0");
    let fixed = config(own, &[("b", "10.0.0.2:8132"), ("b", "[fd00::2]:8132")]);
    let fixed = set(&fixed, 1, false);
    let [b, own_entries] =
        [2, 1].map(|host| [format!("10.0.0.{host}:8132"), format!("[fd00::{host}]:8132")]);
    let named = |id: &str, addresses: &[String; 2]| {
        addresses.clone().map(|address| (id.to_owned(), address))
    };
    let both = [named("b", &b), named("own", &own_entries)].concat();
    assert_eq!(sent(&fixed), (2, both));
    assert_eq!(fixed.advertised().unwrap(), own_entries.join(","));
    let leased = set(&config(own, &[]), 1, true);
    let three = format!("{},192.0.2.9:1", b.join(","));
    lease(&leased, &[("b", Some(&three)), ("c", Some("x,10.0.0.3:8132"))]);
    let c = ("c".to_owned(), "10.0.0.3:8132".to_owned());
    let all = [&named("b", &b)[..], &[c], &named("own", &own_entries)].concat();
    assert_eq!(sent(&leased), (3, all));
    assert_eq!(leased.counts(), [("known", 3), ("unknown", 0)]);
}

#[test]
fn the_set_is_that_of_the_leases_once_they_are_listed_and_changes_with_them() {
    let set = set(&config(Some("10.0.0.1:8132"), &[]), 1, true);
    assert_eq!(sent(&set), (1, vec![]), "not known yet");
    let mut changes = set.subscribe();
    lease(&set, &[("own", None), ("b", Some("10.0.0.2:8132")), ("konnectivity", None)]);
    assert!(changes.has_changed().unwrap());
    let entries = [("b", "10.0.0.2:8132"), ("own", "10.0.0.1:8132"), ("konnectivity", "")];
    assert_eq!(sent(&set), (3, entries_of(&entries)));
    assert_eq!(set.counts(), [("known", 2), ("unknown", 1)]);
    changes.mark_unchanged();
    lease(&set, &[("konnectivity", None), ("b", Some("10.0.0.2:8132"))]);
    assert!(!changes.has_changed().unwrap(), "the same set");
    lease(&set, &[("b", Some("10.0.0.3:8132"))]);
    let entries = [("b", "10.0.0.3:8132"), ("own", "10.0.0.1:8132")];
    assert_eq!(sent(&set), (2, entries_of(&entries)));
}

#[test]
fn an_address_of_a_flag_counts_more_than_that_of_a_lease() {
    let set = set(&config(None, &[("b", "192.0.2.2:8132")]), 5, true);
    let fixed = entries_of(&[("b", "192.0.2.2:8132"), ("own", "")]);
    assert_eq!(sent(&set), (5, fixed.clone()));
    lease(&set, &[("b", Some("10.0.0.2:8132"))]);
    assert_eq!(sent(&set), (5, fixed));
}

#[test]
fn a_lease_whose_annotation_or_holder_is_malformed_adds_no_address() {
    let set = set(&ServerSetConfig::default(), 1, true);
    lease(&set, &[("b", Some("not an address")), ("", Some("10.0.0.9:8132"))]);
    assert_eq!(sent(&set), (2, entries_of(&[("b", ""), ("own", "")])));
}

#[test]
fn what_does_not_fit_a_message_is_left_out_and_counted() {
    let set = set(&ServerSetConfig::default(), 1, true);
    let long: Vec<_> = (0..100).map(|number| format!("{number:0>250}")).collect();
    let holders: Vec<_> = long.iter().map(|id| (id.as_str(), Some("10.0.0.2:8132"))).collect();
    lease(&set, &holders);
    let (count, entries) = sent(&set);
    assert_eq!(count, 101);
    assert!((40..64).contains(&entries.len()), "{}", entries.len());
    let message = (*set.subscribe().borrow().clone()).clone();
    control::ControlMessage::ServerSet(Box::new(message)).encode().unwrap();
    let short: Vec<_> = (0..100).map(|number| number.to_string()).collect();
    let holders: Vec<_> = short.iter().map(|id| (id.as_str(), Some("10.0.0.2:8132"))).collect();
    lease(&set, &holders);
    assert_eq!(sent(&set).1.len(), 64);
}
