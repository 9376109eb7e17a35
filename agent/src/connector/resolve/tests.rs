use std::collections::HashSet;

use tokio::{sync::mpsc, time::Instant};

use super::*;
use crate::{lookups::scripted::ScriptedResolver, metrics::AgentMetrics, test_support::config};

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, last], 8132))
}

fn ipv6(last: u16) -> SocketAddr {
    SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, last], 8132))
}

fn proxies() -> Proxies {
    let variable = |name: &str| (name == "HTTPS_PROXY").then(|| "http://proxy:3128".to_owned());
    Proxies::from_env(variable).unwrap()
}

fn proxied() -> Option<Route> {
    let proxy = proxies().proxy_for("servers", 8132)?;
    Some(Route::Proxied { proxy, host: "servers".into(), port: 8132 })
}

fn shown(
    found: Result<Vec<SocketAddr>, String>,
    proxied: Option<Route>,
    order: CarrierOrder,
) -> Result<Vec<(String, Option<SocketAddr>, CarrierOrder)>, String> {
    let candidates = candidates(found, proxied, order, &Preference::default())?;
    let shown =
        |Candidate { address, order, .. }: Candidate| (address.to_string(), address.quic, order);
    Ok(candidates.into_iter().map(shown).collect())
}

#[test]
fn addresses_come_in_any_order_but_by_preference() {
    let found: Vec<_> = (1..=5).map(address).collect();
    let preference = Preference { first: Some(address(3)), last: vec![address(1), address(3)] };
    let mut seconds = HashSet::new();
    for _ in 0..200 {
        let mut tried = ordered(found.clone(), &preference);
        assert_eq!((tried[0], tried[4]), (address(3), address(1)));
        seconds.insert(tried[1]);
        tried.sort();
        assert_eq!(tried, found);
    }
    assert_eq!(seconds.len(), 3, "{seconds:?}");
}

#[test]
fn families_take_turns_and_the_resolvers_first_one_begins() {
    let found = vec![ipv6(1), address(1), address(2), ipv6(2)];
    let mut firsts = HashSet::new();
    for _ in 0..200 {
        let tried = ordered(found.clone(), &Preference::default());
        let families: Vec<_> = tried.iter().map(SocketAddr::is_ipv4).collect();
        assert_eq!(families, [false, true, false, true], "{tried:?}");
        firsts.insert(tried[0]);
    }
    assert_eq!(firsts.len(), 2, "{firsts:?}");
}

#[test]
fn an_address_with_a_tunnel_is_marked() {
    let preference = Preference { first: None, last: vec![address(1)] };
    let order = CarrierOrder::QuicFirst;
    let found = Ok(vec![address(1), address(2)]);
    let candidates = candidates(found, None, order, &preference).unwrap();
    let marked: Vec<_> = candidates.iter().map(|it| (it.address.quic, it.is_last)).collect();
    assert_eq!(marked, [(Some(address(2)), false), (Some(address(1)), true)]);
}

#[test]
fn a_server_that_only_a_proxy_can_resolve_is_reached_over_tcp_alone() {
    let through_proxy = Ok(vec![("servers port 8132".into(), None, CarrierOrder::Tcp)]);
    let found = Err("no such host".to_owned());
    for order in [CarrierOrder::Tcp, CarrierOrder::TcpFirst, CarrierOrder::QuicFirst] {
        assert_eq!(shown(found.clone(), proxied(), order), through_proxy);
    }
    assert_eq!(shown(found, proxied(), CarrierOrder::Quic), Err("no such host".into()));
}

#[test]
fn a_proxy_is_asked_once_and_quic_goes_to_each_address() {
    let found = Ok(vec![address(1), address(2)]);
    let orders = |order| {
        let candidates = candidates(found.clone(), proxied(), order, &Preference::default());
        let orders: Vec<_> = candidates.unwrap().iter().map(|it| it.order).collect();
        orders
    };
    assert_eq!(orders(CarrierOrder::Tcp), [CarrierOrder::Tcp]);
    assert_eq!(orders(CarrierOrder::QuicFirst), [CarrierOrder::QuicFirst, CarrierOrder::Quic]);
    assert_eq!(orders(CarrierOrder::Quic), [CarrierOrder::Quic, CarrierOrder::Quic]);
    assert_eq!(
        shown(Ok(vec![address(1)]), proxied(), CarrierOrder::QuicFirst),
        Ok(vec![("10.0.0.1:8132".into(), Some(address(1)), CarrierOrder::QuicFirst)])
    );
}

/// The servers' name `host`, its resolver, and the lookups that begin.
fn name(host: &str) -> (ServerName, ScriptedResolver, mpsc::UnboundedReceiver<String>) {
    let config = config(&[&format!("--proxy-server-host={host}"), "--proxy-server-port=8132"]);
    let metrics = AgentMetrics::new().unwrap();
    let (resolver, begun) = ScriptedResolver::new(&["10.0.0.1:0"]);
    let name = ServerName::new(&config.servers, resolver.clone(), metrics.server_lookups);
    (name, resolver, begun)
}

#[tokio::test]
async fn each_attempt_uses_the_addresses_as_they_are_now() {
    let (name, resolver, _begun) = name("servers");
    assert_eq!(name.addresses().await, Ok(vec![address(1)]));
    resolver.set(Ok(&["10.0.0.2:0", "10.0.0.3:0"]));
    assert_eq!(name.addresses().await, Ok(vec![address(2), address(3)]));
}

#[tokio::test]
async fn the_last_addresses_are_used_while_the_lookup_fails() {
    let (name, resolver, _begun) = name("servers");
    resolver.set(Err("Temporary failure"));
    assert_eq!(name.addresses().await, Err("Temporary failure".into()));
    resolver.set(Ok(&["10.0.0.2:0"]));
    assert_eq!(name.addresses().await, Ok(vec![address(2)]));
    for failure in [Err("Temporary failure"), Ok(&[][..])] {
        resolver.set(failure);
        assert_eq!(name.addresses().await, Ok(vec![address(2)]), "{failure:?}");
        assert!(name.uses_last_found.load(Ordering::Relaxed));
    }
    resolver.set(Ok(&["10.0.0.3:0"]));
    assert_eq!(name.addresses().await, Ok(vec![address(3)]));
    assert!(!name.uses_last_found.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn a_lookup_without_an_answer_costs_half_a_second_where_addresses_are_known() {
    let (name, resolver, mut begun) = name("hang");
    // The clock would not wait for the thread.
    tokio::select! {
        answer = name.lookups.look_up("hang") => panic!("{answer:?}"),
        host = begun.recv() => assert_eq!(host.as_deref(), Some("hang")),
    }
    let started = Instant::now();
    assert_eq!(name.addresses().await, Err("no answer within 5s".into()));
    assert_eq!(started.elapsed(), LOOKUP_TIMEOUT);
    *name.last_found.0.lock() = Some(vec![address(9)]);
    let started = Instant::now();
    assert_eq!(name.addresses().await, Ok(vec![address(9)]));
    assert_eq!(started.elapsed(), LOOKUP_PATIENCE);
    // The answer that comes later is used by the attempt after it, even if the next lookup fails.
    resolver.release();
    while name.last_found.get() != Some(vec!["10.0.0.1:0".parse().unwrap()]) {
        std::thread::yield_now();
    }
    begun.try_recv().unwrap_err();
    resolver.set(Err("Temporary failure"));
    assert_eq!(name.addresses().await, Ok(vec![address(1)]));
}

#[tokio::test]
async fn an_address_is_not_looked_up() {
    for host in ["10.0.0.1", "fd00::1"] {
        let (name, resolver, mut begun) = name(host);
        resolver.set(Err("asked for an address"));
        let expected = SocketAddr::new(host.parse().unwrap(), 8132);
        assert_eq!(name.addresses().await, Ok(vec![expected]));
        begun.try_recv().unwrap_err();
    }
}

#[tokio::test]
async fn lookups_of_targets_do_not_delay_that_of_the_servers() {
    let (name, ..) = name("servers");
    let metrics = AgentMetrics::new().unwrap();
    let (resolver, mut begun) = ScriptedResolver::new(&[]);
    let _release = scopeguard::guard(resolver.clone(), |resolver| resolver.release());
    let limits = Limits { running: 2, waiting: 2 };
    let targets = Arc::new(Lookups::new(resolver, limits, metrics.target_lookups));
    let mut hung = tokio::task::JoinSet::new();
    for number in 0..5 {
        let targets = targets.clone();
        hung.spawn(async move { targets.look_up(&format!("hang-{number}")).await });
    }
    assert!(hung.join_next().await.unwrap().unwrap().is_err(), "the fifth one is refused");
    for _ in 0..2 {
        begun.recv().await.unwrap();
    }
    assert_eq!(name.addresses().await, Ok(vec![address(1)]));
}
